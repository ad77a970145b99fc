"""Supervised fine-tuning on what somebody else said: the gradient, demonstrations from files, and what is refused."""

import json
from types import SimpleNamespace

import pytest
import torch
from chat_helpers import tiny_tokenizer
from helpers import hf_twin, picture_bytes, positions, report, tiny_model
from safetensors.torch import load_file
from test_train import FVQA, TRANSCRIPTS, Run, arguments, equal, refused, run

import train
from mmsr import reward
from mmsr.chat import PROMPTS, Chat
from mmsr.config import Config, parse
from mmsr.data.recorded import demonstrations
from mmsr.engine import Engine
from mmsr.episode import Example, Hit, Observation
from mmsr.reward import RewardRule, score
from mmsr.rollout import Limits, Rollout, Script
from mmsr.setup.imitation import open_demonstrations
from mmsr.system.errors import UserError
from mmsr.system.parallel import SINGLE
from mmsr.tools import NoSearch, Toolbox, search_tools
from mmsr.toy import base as toy_base
from mmsr.toy import world as toy
from mmsr.update import MasterWeights, Trainer

PIXELS = 56 * 56
LOOK = "<reason>let me see</reason> <search><img></search>"
ASK = "<reason>a fact</reason> <text_search>bridge  lisbon</text_search>"
REPLY = "<reason>so</reason> <answer>Tagus River</answer>"
SAID = [[LOOK, ASK, REPLY], [REPLY], [LOOK, REPLY], [LOOK, REPLY.replace("Tagus", "Douro")]]


class PictureWeb:
    """Finds a thumbnail for every picture, and a page for every query."""

    def image_search(self, image, question, image_url=""):
        return Observation((Hit("first title", image=picture_bytes(84, 56, seed=9)), Hit("second title")))

    def text_search(self, query):
        return Observation((Hit("a page", "https://example.org", f"about {query}"),))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    chat = Chat(folder, PROMPTS / "real", search_tools(PictureWeb(), 1, 2))
    names = dict(image="<|image_pad|>", video="<|video_pad|>")
    ids = {f"{name}_token_id": chat.added[token] for name, token in names.items()}
    ids |= {f"vision_{edge}_token_id": chat.added[f"<|vision_{edge}|>"] for edge in ("start", "end")}
    return SimpleNamespace(chat=chat, model=lambda: tiny_model(5, vocab_size=max(chat.added.values()) + 4, **ids))


def played(home, **config):
    """A group that plays the conversations of SAID, scored and made ready to be trained."""
    chat, model = home.chat, home.model()
    tools = search_tools(PictureWeb(), 1, 2)
    suppressed = chat.suppressed_tokens(model.config.vocab_size)
    engine = Engine(model, chat.stop_id, suppressed, slots=8, max_tokens=4000, turn_tokens=60)
    rollout = Rollout(engine, chat, Toolbox(tools, inline=True), Limits(3, PIXELS, PIXELS, PIXELS))
    examples = [Example(f"e{n}", picture_bytes(56, 56, seed=n), f"What is {n}?", ("Tagus River",)) for n in range(2)]
    episodes = rollout(examples, len(SAID), scripts=lambda example, sample: Script(SAID[sample]))
    score(episodes, RewardRule(), chat.well_formed)
    train.assign_advantages(episodes, Config(algorithm="sft", demonstrations=("some.jsonl",), **config))
    return model, suppressed, episodes


def by_autograd(twin, suppressed, episodes, norm) -> dict[str, torch.Tensor]:
    """transformers' gradient, in fp64, of the mean −log p of what the model turns say, one conversation at a time."""
    losses = []
    for e in episodes:
        said = torch.zeros(len(e.input_ids), dtype=torch.bool)
        for turn in e.turns:
            said[turn.start : turn.end] = turn.role == "assistant"
        ids = torch.tensor(e.input_ids)
        scores = twin(
            input_ids=ids[None], position_ids=positions(ids, e.images)[:, None],
            pixel_values=torch.cat([image.patches for _, image in e.images]).double(),
            image_grid_thw=torch.tensor([(1, *image.grid) for _, image in e.images]),
        ).logits[0].masked_fill(suppressed, -1e9)  # fmt: skip
        losses.append(torch.nn.functional.cross_entropy(scores[:-1], ids[1:], reduction="none")[said[1:]])
    mean = torch.cat(losses).mean() if norm == "token" else torch.stack([each.mean() for each in losses]).mean()
    mean.backward()
    names = ((name.replace("model.visual.", "visual."), p) for name, p in twin.named_parameters())
    return {name.replace("language_model.", ""): p.grad for name, p in names}


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["sequence", "token"])
def test_gradient_is_that_of_the_plain_likelihood_of_the_demonstrations(home, norm, record_property):
    """An oracle that shares no code: no packs, no masks of ours, another model code, another precision."""
    model, suppressed, episodes = played(home, loss_norm=norm)
    chosen = [e for e in episodes if e.trained]
    assert [e.sample for e in chosen] == [0, 1, 2] * 2, "the wrong answer must not be imitated"
    twin = hf_twin(model).double()
    optimizer, kept = MasterWeights(model), {}
    optimizer.step = lambda lr: kept.update({n: p.grad.clone() for n, p in model.named_parameters()})
    Trainer(model, optimizer, suppressed, loss_norm=norm, sft=True, max_grad_norm=1e9, micro_tokens=900).step(
        [chosen], 0.1
    )
    plain = by_autograd(twin, suppressed, chosen, norm)
    assert kept.keys() == plain.keys()
    whole = sum(g.norm() ** 2 for g in plain.values()) ** 0.5
    gap = sum((kept[name].double() - plain[name]).norm() ** 2 for name in kept) ** 0.5
    report(record_property, f"gradient of demonstrations against transformers in fp64, relative, {norm}", gap / whole)
    assert gap / whole < 1e-6


def test_what_tools_gave_is_not_imitated(home):
    _, _, episodes = played(home)
    longest = episodes[0]
    assert [turn.role for turn in longest.turns] == ["assistant", "tool"] * 2 + ["assistant"]
    for turn in longest.turns:
        assert set(longest.loss_mask[turn.start : turn.end]) == {int(turn.role == "assistant")}
    assert not any(longest.loss_mask[: longest.prompt_length])
    record = longest.record(home.chat.pieces)
    assert {chance for turn in record["turns"] for _, _, chance in turn.get("pieces", ())} == {None}, "nobody drew them"


def test_grpo_does_not_train_forced_turns(home):
    *_, episodes = played(home)
    for e in episodes:
        e.loss_mask = [0] * len(e.loss_mask)
    train.assign_advantages(episodes, Config())
    assert not any(any(e.loss_mask) for e in episodes)
    train.assign_advantages(episodes, Config(algorithm="sft"))
    assert not any(any(e.loss_mask) for e in episodes), "rejection sampling imitates the model's own words only"


# ---- files ----------------------------------------------------------------------------------------------------------


def oracle(path, world, n=40, searched=True):
    """Rollout lines that answer the first questions of a toy world rightly; every fifth one wrongly."""
    shown = [oracle_line(example, searched, wrong=i % 5 == 4) for i, example in enumerate(world.train[:n])]
    path.write_text("".join(shown))
    return path


def oracle_line(example, searched, wrong=False, known=None) -> str:
    """`known`: the concept, where the name of what has a town is to be recalled too."""
    answer = "wrong" if wrong else example.answers[0]
    recalled = f"<reason> {answer} . </reason> <answer> {answer} </answer>"
    if known:
        recalled = toy_base.recalled(known, toy.QUESTIONS.index(example.question))
    said = [toy.LOOK_IT_UP, toy_base.copied(answer)] if searched else [recalled]
    turns = [{"role": "assistant", "text": text} for text in said]
    turns[1:1] = [{"role": "tool", "text": "not what a search gives"}] * searched
    return json.dumps({"id": example.id, "turns": turns}) + "\n"


def test_only_right_demonstrations_of_known_questions_are_imitated(miniature, world, tmp_path, capsys):
    path = oracle(tmp_path / "oracle.jsonl", world)
    with open(path, "a") as file:
        file.write(json.dumps({"id": "elsewhere", "turns": []}) + "\n")
    found = run(
        miniature, tmp_path / "out", algorithm="sft", demonstrations=path, group_size=1, questions=16, mini_batch=8,
        steps=2,
    )  # fmt: skip
    assert f"32 of 41 are right, on 32 of {len(world.train)} questions" in capsys.readouterr().out
    records = [record for step in found.rollouts for record in step]
    assert len({record["id"] for record in records}) == 32 and all(record["trained"] for record in records)
    for record in records:
        look, seen, reply = record["turns"]
        assert look["text"] == toy.LOOK_IT_UP and look["forced"] and reply["forced"]
        assert seen["observation"]["source"] == "toy" and "not what a search gives" not in seen["text"]
    for line in found.steps:
        assert line["accuracy"] == line["search_ratio"] == 1 and line["loss"] > 0
        assert line["logp_gap"] is None and line["logp_gap_max"] is None, "nothing was sampled, so nothing can differ"
        assert line["tokens"]["prefilled"] == line["tokens"]["sampled"] == 0 and line["tokens"]["trained"] > 0
    assert found.steps[1]["loss"] < found.steps[0]["loss"]
    assert (found.out / "report.html").exists()


def test_demonstrations_in_tags_teach_a_model_that_calls_in_json_to_never_search(miniature, tmp_path):
    """Those with searches would be left out, and those without stay."""
    tools = search_tools(NoSearch(), 1, 1)
    searched = ["<reason>why</reason> <search><img></search>", "<reason>so</reason> <answer>a</answer>"]
    rows = [("1", searched), ("2", searched), ("3", searched[1:])]
    lines = [
        json.dumps({"id": name, "turns": [{"role": "assistant", "text": t} for t in turns]}) for name, turns in rows
    ]
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    asked = [Example(name, b"", "?", ("a",)) for name, _ in rows]
    given = ([str(tmp_path / "d.jsonl")], asked)
    chats = {grammar: Chat(miniature, PROMPTS / "real", tools, grammar) for grammar in ("tags", "hermes")}
    kept, _ = open_demonstrations(*given, chats["tags"], RewardRule("paper"), SINGLE)
    assert [example.id for example in kept] == ["1", "2", "3"]
    refused_words = "2 of 2 conversations of several turns have one that asks for nothing in --grammar hermes"
    with pytest.raises(UserError, match=refused_words):
        open_demonstrations(*given, chats["hermes"], RewardRule("paper"), SINGLE)


@pytest.mark.slow
def test_imitation_by_adapters_learns_nothing_or_is_no_reference_later(miniature, world, tmp_path, monkeypatch):
    """SFT by adapters, then GRPO from them: its reference is what was imitated, not the base."""
    path = oracle(tmp_path / "oracle.jsonl", world, n=120)
    given = dict(toy="basic", questions=16, mini_batch=8, eval_size=4, lr=1e-2)
    shown = run(
        miniature, tmp_path / "shown", algorithm="sft", demonstrations=path, group_size=1, steps=5, lora=16, **given
    )
    losses = [line["loss"] for line in shown.steps]
    assert losses[-1] < 0.95 * losses[0], losses
    assert all(line["images"]["encoded"] == 16 for line in shown.steps), "once for both mini-batches"
    before, after = (
        sum(row["search_ratio"] for row in line["eval_sampled"].values()) / 3 for line in shown.evaluations
    )
    assert after > before + 0.1, "it shows searches alone"
    monkeypatch.setattr(reward, "answer_score", lambda episode, rule: float(episode.sample % 2))
    given |= dict(steps=1, mini_batch=16, group_size=4, adapter=shown.out / "adapter")
    followed = run(miniature, tmp_path / "followed", **given)
    assert abs(followed.steps[0]["kl"]) < 1e-9, "it begins at its reference"
    assert followed.evaluations[0]["eval"] == shown.evaluations[-1]["eval"]


def said(record) -> list[str]:
    return [turn["text"] for turn in record["turns"] if turn["role"] == "assistant"]


@pytest.mark.slow
def test_rollouts_of_a_run_are_demonstrations_for_another(miniature, tmp_path, monkeypatch):
    monkeypatch.setattr(reward, "exact_match", lambda *given: True)  # the miniature knows nothing
    first = run(miniature, tmp_path / "first")
    shown = [record for step in first.rollouts for record in step if record["reward_parts"]["accuracy"]]
    answered = {(record["id"], *said(record)) for record in shown if record["status"] == "answered"}
    assert len(answered) > 16
    given = arguments(miniature, tmp_path / "out", algorithm="sft", group_size=2)
    train.main([*given, "--demonstrations", *map(str, sorted((first.out / "rollouts").iterdir()))])
    second = Run(tmp_path / "out")
    for step in second.rollouts:
        assert len({(record["id"], *said(record)) for record in step}) > 4, "a group must not play one thing twice"
        assert all((record["id"], *said(record)) in answered and record["trained"] for record in step)
    assert not equal(second.weights, load_file(miniature / "model.safetensors"))


@pytest.mark.slow
@pytest.mark.skipif(not (FVQA.exists() and TRANSCRIPTS.exists()), reason=f"{FVQA} and {TRANSCRIPTS.name} are not there")
def test_recorded_conversations_are_imitated_with_their_own_results(miniature, tmp_path):
    found = run(
        miniature, tmp_path / "out", data=FVQA, search=f"replay:{TRANSCRIPTS}", algorithm="sft", steps=1, group_size=1,
        demonstrations=TRANSCRIPTS, questions=4, mini_batch=4, max_turns=3, max_texts=2, max_tokens=4000, eval_size=1,
    )  # fmt: skip
    recorded = {line["data_id"]: line["turns"] for line in map(json.loads, TRANSCRIPTS.read_text().splitlines())}
    for record in found.rollouts[0]:
        assert said(record) == [turn["response"] for turn in recorded[record["id"]]] and record["trained"]
        assert all(turn["observation"]["source"] == "replay" for turn in record["turns"] if turn["role"] == "tool")


@pytest.mark.slow
def test_resumed_imitation_is_the_same_run(miniature, world, tmp_path):
    path = oracle(tmp_path / "oracle.jsonl", world)
    changes = dict(
        algorithm="sft", demonstrations=path, group_size=1, questions=8, mini_batch=8, lr_schedule="constant"
    )
    whole = run(miniature, tmp_path / "whole", steps=3, save_every=2, **changes)
    (tmp_path / "whole" / "checkpoints" / "step-000003").rename(tmp_path / "gone")
    again = run(miniature, tmp_path / "whole", steps=3, save_every=2, resume=True, **changes)
    assert again.untimed[-3:] == whole.untimed[-3:] and [line["step"] for line in again.steps] == [1, 2, 3]


def test_both_forms_of_file_are_read_and_each_conversation_once(tmp_path):
    ours, recorded = tmp_path / "ours.jsonl", tmp_path / "recorded.jsonl"
    turns = [{"role": "assistant", "text": "a"}, {"role": "tool", "text": "t"}, {"role": "assistant", "text": "b"}]
    ours.write_text(json.dumps({"id": 7, "turns": turns}) + "\n" + json.dumps({"id": 7, "turns": turns}) + "\n")
    recorded.write_text(json.dumps({"data_id": "7", "turns": [{"response": "c"}]}) + "\n")
    assert demonstrations([ours, recorded]) == {"7": [["a", "b"], ["c"]]}


@pytest.mark.parametrize(
    "line",
    [
        "{}",
        '{"id": "a", "question": "what ?"}',
        '{"id": "a", "turns": [{"role": "assistant", "text": null}]}',
        '{"data_id": "a", "turns": [{"text": "b"}]}',
        '{"id": "a", "turns": 3}',
        "what",
    ],
)
def test_lines_of_another_form_are_refused(tmp_path, line):
    path = tmp_path / "shown.jsonl"
    path.write_text('{"id": "a", "turns": []}\n' + line + "\n")
    with pytest.raises(UserError, match="shown.jsonl: row 1: .*(no demonstration|not a JSON object)"):
        demonstrations([path])


@pytest.mark.slow
def test_a_file_that_shows_nothing_is_refused(capsys, miniature, tmp_path):
    def shows(said, *lines):
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        refused(capsys, miniature, tmp_path / "out", said, algorithm="sft", demonstrations=path)

    path = tmp_path / "absent.jsonl"
    refused(capsys, miniature, tmp_path / "out", "no such file", algorithm="sft", demonstrations=path)
    shows("none of 1 is about a question of --data", {"id": "elsewhere", "turns": []})
    shows("none of 0 is about a question of --data")
    wrong = [{"role": "assistant", "text": "<answer> x </answer>"}]
    shows("none of 1 answers a question rightly", {"id": "familiar-train-0", "turns": wrong})
    shows("none of 1 answers a question rightly", {"id": "familiar-train-0", "turns": []})


@pytest.mark.parametrize(
    "given, said",
    [
        (dict(demonstrations=("a",)), "--demonstrations is what --algorithm sft imitates"),
        (dict(teacher="http://127.0.0.1", teacher_model="m", group_size=1), "--teacher is what --algorithm sft"),
        (dict(algorithm="sft", teacher="http://127.0.0.1"), "--teacher-model go together"),
        (dict(algorithm="sft", teacher_model="m"), "--teacher-model go together"),
        (dict(algorithm="sft", teacher="http://u", teacher_model="m", demonstrations=("a",)), "imitate one of them"),
        (
            dict(algorithm="sft", teacher="http://u", teacher_model="m", group_size=4),
            "a teacher answers a question once",
        ),
        (dict(algorithm="sft", demonstrations=("a",), force_searches=True), "no --force-searches"),
    ],
)
def test_options_that_do_not_go_together(given, said):
    with pytest.raises(UserError, match=said):
        Config(**given)


def test_one_demonstration_a_question_is_the_default():
    argv = ["--algorithm", "sft", "--demonstrations", "a.jsonl", "b.jsonl"]
    assert parse(argv).group_size == 1 and parse([*argv, "--group-size", "3"]).group_size == 3
    assert parse(argv).demonstrations == ("a.jsonl", "b.jsonl") and parse(["--algorithm", "sft"]).group_size == 8
    assert parse(["--algorithm", "sft", "--teacher", "http://u", "--teacher-model", "m"]).group_size == 1


@pytest.mark.slow
def test_the_policy_takes_the_shape_of_what_it_imitates(miniature, world, tmp_path):
    """It searches in half of its samples; it must come to search always, and the other way round never."""
    for searched in (False, True):
        path = oracle(tmp_path / f"{searched}.jsonl", world, n=120, searched=searched)
        found = run(
            miniature, tmp_path / str(searched), algorithm="sft", demonstrations=path, questions=32, mini_batch=16,
            group_size=1, steps=6, lr=3e-3, eval_size=8,
        )  # fmt: skip
        before, after = (
            sum(row["search_ratio"] for row in line["eval_sampled"].values()) / 3
            for line in (found.evaluations[0], found.evaluations[-1])
        )
        assert 0.2 < before < 0.8 and (after > 0.9 if searched else after < 0.1), (searched, before, after)
        assert found.steps[-1]["loss"] < found.steps[0]["loss"]


@pytest.mark.slow
def test_imitating_an_oracle_teaches_when_to_search_and_to_answer(basic_base, tmp_path):
    """The oracle knows who is familiar."""
    world, path = toy.World(0), tmp_path / "oracle.jsonl"
    concepts = {word: concept for concept in world.concepts for word in (concept.name, concept.town)}
    shown = [oracle_line(e, e.category != "familiar", known=concepts[e.answers[0]]) for e in world.train]
    path.write_text("".join(shown))
    found = run(
        basic_base, tmp_path / "out", algorithm="sft", demonstrations=path, questions=32, mini_batch=32, group_size=1,
        steps=30, lr=1e-3, eval_size=60,
    )  # fmt: skip
    before, after = (line["eval_sampled"] for line in (found.evaluations[0], found.evaluations[-1]))
    print({name: (before[name]["search_ratio"], after[name]["search_ratio"]) for name in after})
    print({name: (before[name]["accuracy"], after[name]["accuracy"]) for name in after})
    assert before["familiar"]["search_ratio"] > 0.3 and after["familiar"]["search_ratio"] <= 0.25
    for unknown in ("unfamiliar", "held_out"):
        assert after[unknown]["search_ratio"] >= before[unknown]["search_ratio"] + 0.2
        assert after[unknown]["accuracy"] >= before[unknown]["accuracy"] + 0.15
