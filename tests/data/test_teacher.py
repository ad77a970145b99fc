"""The teacher: what it is asked, what is kept, and what a failing one may not do. Its server is a fake on loopback."""

import base64
import json
import os
import signal
import threading

import pytest
from chat_helpers import QWEN3_CONTROL, tiny_tokenizer
from fake_web import FakeWeb, status
from helpers import picture_bytes
from test_train import Run, arguments, questions, run

import train
from mmsr.chat import OPENED, PROMPTS, Chat
from mmsr.data.teacher import FAILED, Teacher, chat_messages
from mmsr.episode import Example, Hit, Observation
from mmsr.net import client
from mmsr.rollout import Limits
from mmsr.system.errors import UserError
from mmsr.tools import Toolbox, ToolFailure, search_tools

LOOK = "<reason> let me look it up . </reason> <search><img></search>"
REPLY = "<reason> so . </reason> <answer> a </answer>"
THUMBNAIL = picture_bytes(60, 60, seed=3)
SECONDS = 60


class Web:
    def image_search(self, image, question, image_url=""):
        return Observation((Hit("<|im_end|> a title", image=THUMBNAIL), Hit("other", image=b"broken"), Hit("third")))

    def text_search(self, query):
        return Observation((Hit("a page", "https://example.org", f"about {query}"),))


def example(n=0) -> Example:
    return Example(f"e{n}", picture_bytes(56, 56, seed=n), f"What is {n}?", ("a",))


class Fake:
    """Says `turns` one after another in each conversation; raises those that are exceptions."""

    def __init__(self, *turns):
        self.turns, self.asked, self.lock = turns, [], threading.Lock()

    def __call__(self, messages):
        with self.lock:
            self.asked.append(json.loads(json.dumps(messages)))
        said = self.turns[sum(message["role"] == "assistant" for message in messages)]
        if isinstance(said, Exception):
            raise said
        return said


@pytest.fixture
def teacher(tmp_path):
    folder = tiny_tokenizer(tmp_path)

    def make(complete, name="fake", turns=3, texts=2, prompts="real") -> Teacher:
        tools = search_tools(Web(), 1, texts)
        chat = Chat(folder, PROMPTS / prompts, tools)
        limits = Limits(turns, 56 * 56, 56 * 56)
        return Teacher(complete, name, tmp_path / "teacher.jsonl", chat, Toolbox(tools, inline=True), limits)

    return make


def taught(teacher, n=1):
    return [future.result(SECONDS).turns for future in [teacher(example(i), 0) for i in range(n)]]


# ---- one conversation -----------------------------------------------------------------------------------------------


def test_a_teacher_is_not_told_how_to_call_or_where_results_end(tmp_path):
    """In the grammar of calls in JSON, whose markup is control tokens: a server gets them as text."""
    folder = tiny_tokenizer(tmp_path, control=QWEN3_CONTROL)
    tools = search_tools(Web(), 1, 2)
    call = 'I wonder.\n<tool_call>\n{"name": "text_search", "arguments": {"query": "q"}}\n</tool_call>'
    for start in ("", OPENED):
        chat = Chat(folder, PROMPTS / "hermes", tools, "hermes", start)
        fake = Fake(call, "So.\n<answer>a</answer>")
        journal = tmp_path / f"teacher{len(start)}.jsonl"
        subject = Teacher(fake, "fake", journal, chat, Toolbox(tools, inline=True), Limits(3, 56 * 56, 56 * 56))
        assert taught(subject) == [[call, "So.\n<answer>a</answer>"]]
        system, _, said, result = fake.asked[-1]
        assert '<tool_call>\n{"name": <function-name>' in system["content"]
        assert said["content"] == call and result["role"] == "user"
        assert result["content"].startswith("<tool_response>\n") and result["content"].endswith("\n</tool_response>")


def test_a_teacher_sees_what_the_model_sees(teacher):
    """Prompt, picture, results and thumbnails in the roles of the rollout; a broken thumbnail leaves its title."""
    fake = Fake(LOOK, REPLY)
    subject = teacher(fake)
    assert taught(subject) == [[LOOK, REPLY]]
    first, second = fake.asked
    assert [message["role"] for message in second] == ["system", "user", "assistant", "user"] and second[:2] == first
    assert first[0]["content"] == "You are a helpful assistant."
    picture, words = first[1]["content"]
    assert _file(picture) == example().image
    assert "What is 0?" in words["text"] and "<search><img></search>" in words["text"]
    assert second[2]["content"] == LOOK
    before, thumbnail, back = second[3]["content"]
    assert _file(thumbnail) == THUMBNAIL and "<information>" in before["text"] and "user\n" not in before["text"]
    assert "<|im_end|> a title" in before["text"], "a page's control words are words and must not end a message"
    assert "other" in back["text"] and "third" in back["text"] and "</information>" in back["text"]


def _file(part) -> bytes:
    return base64.b64decode(part["image_url"]["url"].partition("base64,")[2])


def test_turns_without_pictures_are_plain_text(teacher):
    chat = teacher(Fake(), prompts="toy").chat
    assert chat_messages(chat, chat.prompt("what is this ?", None), []) == [
        {"role": "user", "content": "what is this ? search ?"}
    ]


@pytest.mark.parametrize(
    "turns, said",
    [
        ([REPLY], [REPLY]),
        (["I do not know."], ["I do not know."]),  # nothing that can be read ends it, as in a rollout
        ([LOOK, LOOK, REPLY], [LOOK, LOOK, REPLY]),  # the second is over its limit, and refused
        ([LOOK, LOOK, LOOK, REPLY], [LOOK, LOOK, LOOK]),  # out of turns
    ],
)
def test_a_conversation_ends_where_a_rollout_would(teacher, turns, said):
    fake = Fake(*turns)
    assert taught(teacher(fake)) == [said] and len(fake.asked) == len(said)
    if len(said) == 3:
        refusal = fake.asked[2][-1]["content"]
        assert isinstance(refusal, str) and "a title" not in refusal


def test_what_failed_is_left_out_and_asked_for_again(teacher, capsys):
    failing = teacher(Fake(LOOK, ToolFailure("timeout", "no answer")))
    assert taught(failing, 3) == [FAILED.turns] * 3 and failing.failed == 3
    assert capsys.readouterr().err.count("the teacher failed on") == 1
    working = Fake(ToolFailure("network", "asked for what is kept"), REPLY)
    assert taught(teacher(working), 3) == [[LOOK, REPLY]] * 3, "first turns are on disk, second ones are not"


@pytest.mark.parametrize("kind", ["auth", "credits"])
def test_a_refused_key_ends_the_run(teacher, kind):
    with pytest.raises(UserError, match="no more calls"):
        taught(teacher(Fake(ToolFailure(kind, "no more calls"))))


def test_answers_are_kept_by_model_and_by_all_that_was_asked(teacher, tmp_path):
    fake = Fake(LOOK, REPLY)
    taught(teacher(fake), 4)
    with open(tmp_path / "teacher.jsonl", "a") as file:
        file.write('{"key": "cut sho')  # a crash
    again = Fake(*[ToolFailure("network", "paid for already")] * 2)
    assert taught(teacher(again), 4) == [[LOOK, REPLY]] * 4 and not again.asked
    other = Fake(REPLY)
    assert taught(teacher(other, name="other"), 4) == [[REPLY]] * 4 and len(other.asked) == 4
    assert taught(teacher(again, name="other"), 4) == [[REPLY]] * 4, "a line after a cut one must be read"


def test_conversations_run_beside_each_other(teacher):
    meeting = threading.Barrier(4, timeout=SECONDS)
    fake = Fake(REPLY)

    def complete(messages):
        meeting.wait()
        return fake(messages)

    assert taught(teacher(complete), 4) == [[REPLY]] * 4


# ---- runs -----------------------------------------------------------------------------------------------------------


def answering(body) -> str:
    """A teacher that looks everything up, and answers the third question wrongly."""
    pictures = [part for part in body["messages"][0]["content"] if part["type"] == "image_url"]
    wrong = base64.b64encode(picture_bytes(56, 56, seed=2)).decode() in pictures[0]["image_url"]["url"]
    searched = any(message["role"] == "assistant" for message in body["messages"])
    return ("<think>hm</think>" + REPLY.replace(" a ", " b " if wrong else " a ")) if searched else LOOK


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "teacher-canary-0123456789")
    monkeypatch.setattr(client, "BACKOFF", 0.0)
    with FakeWeb() as web:
        web.answer = answering
        yield web


def options(web, tmp_path, **changes) -> dict:
    data = tmp_path / "data"
    return dict(
        algorithm="sft", teacher=web.url, teacher_model="big", data=data / "data.jsonl", search="none", group_size=1,
        save_every=1, lr_schedule="constant",
    ) | changes  # fmt: skip


def test_a_run_imitates_what_its_teacher_answers_rightly(miniature, server, tmp_path):
    questions(tmp_path / "data", 4)
    found = run(miniature, tmp_path / "out", **options(server, tmp_path))
    assert len(server.calls("openai")) == 8, "four conversations of two turns; the second epoch is free"
    assert all(seen.json()["model"] == "big" for seen in server.calls("openai"))
    for step, line in zip(found.rollouts, found.steps):
        assert {record["id"]: record["trained"] for record in step} == {f"row{n}": n != 2 for n in range(4)}
        assert all([turn["text"] for turn in record["turns"]][0] == LOOK for record in step)
        assert line["accuracy"] == 0.75 and line["loss"] > 0 and line["status"] == {"answered": 4}
    assert "teacher-canary" not in "".join(f.read_text() for f in (tmp_path / "out").glob("*.json*"))


@pytest.mark.slow
def test_a_resumed_run_asks_for_nothing_twice(miniature, server, tmp_path, monkeypatch):
    questions(tmp_path / "data", 4)
    whole = run(miniature, tmp_path / "whole", **options(server, tmp_path))
    server.seen.clear()
    assign = train.assign_advantages
    monkeypatch.setattr(train, "assign_advantages", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # after the first rollout: all is paid for
        run(miniature, tmp_path / "out", **options(server, tmp_path))
    assert len(server.calls("openai")) == 8
    monkeypatch.setattr(train, "assign_advantages", assign)
    train.main(arguments(miniature, tmp_path / "out", resume=True, **options(server, tmp_path)))
    assert len(server.calls("openai")) == 8 and Run(tmp_path / "out").untimed == whole.untimed


def test_an_interrupt_while_the_teacher_is_asked_loses_no_answer(miniature, server, tmp_path, capsys):
    questions(tmp_path / "data", 4)
    asked, before = [], threading.enumerate()

    def answer(body):
        asked.append(body)
        if len(asked) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return answering(body)

    server.answer = answer
    with pytest.raises(SystemExit) as stop:
        run(miniature, tmp_path / "out", **options(server, tmp_path))
    assert stop.value.code == 130 and "no step was finished" in capsys.readouterr().out
    for thread in threading.enumerate():  # what had begun ends, as it does before a process exits
        if thread.name.startswith("teacher") and thread not in before:  # idle ones of other runs may be there
            thread.join(SECONDS)
            assert not thread.is_alive()
    found = run(miniature, tmp_path / "out", resume=True, **options(server, tmp_path))
    assert len(found.steps) == 2 and len(server.calls("openai")) == 8


def test_a_run_whose_teacher_fails_learns_from_the_rest(miniature, server, tmp_path, capsys):
    """One conversation broken by the server, one in no grammar of ours."""
    questions(tmp_path / "data", 4)
    wrong = {0: "It is a.", 1: None}

    def answer(body):
        url = body["messages"][0]["content"][0]["image_url"]["url"]
        for n, said in wrong.items():
            if base64.b64encode(picture_bytes(56, 56, seed=n)).decode() in url:
                return said
        return answering(body)

    server.answer = answer
    found = run(miniature, tmp_path / "out", **options(server, tmp_path, steps=1))
    (step,) = found.rollouts
    assert {r["id"]: (r["status"], r["trained"]) for r in step} == {
        "row0": ("invalid", False), "row1": ("invalid", False), "row2": ("answered", False), "row3": ("answered", True),
    }  # fmt: skip
    assert found.steps[0]["tokens"]["sampled"] == 0, "a failed conversation is not made up by the model itself"
    assert "the teacher failed on row1" in capsys.readouterr().err


def test_a_server_that_refuses_the_key_is_one_line(miniature, server, tmp_path, capsys):
    questions(tmp_path / "data", 4)
    server.always("openai", status(401, {"error": {"message": "Incorrect API key provided"}}))
    with pytest.raises(SystemExit) as stop:
        train.main(arguments(miniature, tmp_path / "out", **options(server, tmp_path)))
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and last.startswith("train.py: --teacher: auth") and "--resume" in last
