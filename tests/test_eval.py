"""`eval.py` as a user runs it, on a base model that was made in seconds (conftest.py)."""

import json
import os
import shutil
import signal
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest
from helpers import documented, picture_bytes, random_adapter
from safetensors.torch import load_file, save_file

import eval as evaluation
from mmsr.chat import PROMPTS
from mmsr.config import EvalConfig, parse
from mmsr.rollout import Script
from mmsr.system.files import Lock
from mmsr.toy import world as toy

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
FVQA, TRANSCRIPTS = SHARED / "fvqa_sample.parquet", SHARED / "mmsearch_r1_7b_transcripts.jsonl"
KEYS = {
    *("n", "accuracy", "accuracy_judge", "search_ratio", "search_ratio_image", "search_ratio_text", "calls_ratio"),
    *("tool_failures", "turns", "tokens", "tokens_sampled", "accuracy_strict", "format", "reward"),
}
LINE = {
    *("data", "row", "id", "group", "sample", "question", "answers", "category", "status", "turns", "answer", "reward"),
    *("reward_parts", "advantage", "tokens", "measures", "seconds"),
}


@pytest.fixture(scope="module", autouse=True)
def _worlds_are_made_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, "World", lru_cache(toy.World))
        yield


def arguments(model, out, **changes) -> list[str]:
    argv = []
    for name, value in {
        "model": model,
        "recipe": "toy",
        "toy": "basic",
        "data": "toy",
        "limit": 4,
        "out": out,
        **changes,
    }.items():
        values = value if isinstance(value, list) else [value]
        argv += [f"--{name.replace('_', '-')}", *map(str, values)]
    return argv


class Run:
    def __init__(self, out: Path):
        self.results = json.loads((out / "results.json").read_text())
        self.lines = [json.loads(line) for line in (out / "episodes.jsonl").read_text().splitlines()]


def run(model, out, **changes) -> Run:
    evaluation.main(arguments(model, out, **changes))
    return Run(out)


def texts(found: Run) -> list[list[str]]:
    return [[turn["text"] for turn in line["turns"]] for line in found.lines]


def questions(folder: Path, n: int = 6, category: str = "made") -> Path:
    folder.mkdir()
    lines = []
    for i in range(n):
        (folder / f"{i}.png").write_bytes(picture_bytes(56, 56, seed=i))
        lines.append({"id": f"q{i}", "image": f"{i}.png", "question": "what is this ?", "answers": ["a"]})
    text = "".join(json.dumps(line | {"category": category}) + "\n" for line in lines)
    (folder / "data.jsonl").write_text(text)
    return folder / "data.jsonl"


def refused(capsys, argv, said, ends=False) -> None:
    """Exit status 2 and one line; with `ends` of a run that has begun, behind its progress bar."""
    capsys.readouterr()  # what came before
    with pytest.raises(SystemExit) as stop:
        evaluation.main(argv)
    err = capsys.readouterr().err
    last = err.rstrip("\n").split("\n")[-1] if ends else err
    assert stop.value.code == 2 and last.startswith("eval.py: ") and said in last, err
    assert "Traceback" not in err and (ends or err.count("\n") == 1), err


@pytest.fixture(scope="module")
def first(miniature, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "first"
    run(miniature, out, temperature=1)
    return out


# ---- what it writes -------------------------------------------------------------------------------------------------


def test_results_and_lines_have_every_key_of_the_contract(first):
    found = Run(first)
    assert list(found.results) == ["toy"] and KEYS <= found.results["toy"].keys()
    assert set(found.results["toy"]["by_category"]) == {"familiar", "unfamiliar", "held_out"}
    assert all(KEYS <= row.keys() and row["n"] == 4 for row in found.results["toy"]["by_category"].values())
    assert all(LINE <= line.keys() for line in found.lines)
    assert [line["row"] for line in found.lines] == list(range(12))


def test_the_page_about_files_names_other_keys_than_the_files_have(first):
    found, keys = Run(first), documented("`results.json`")
    assert found.results["toy"].keys() == keys
    whole = {"search_precision", "search_recall", "interval", "by_category"}
    assert all(row.keys() == keys - whole for row in found.results["toy"]["by_category"].values())
    more = {"data", "row", "measures", "seconds"}
    assert all(line.keys() == documented("`rollouts/") | more for line in found.lines)


def test_results_agree_with_the_lines(first):
    found = Run(first)
    whole = found.results["toy"]

    def mean(value):
        return pytest.approx(sum(map(value, found.lines)) / 12)

    assert whole["accuracy"] == mean(lambda line: line["reward_parts"]["accuracy"])
    assert whole["search_ratio"] == mean(lambda line: any(turn["role"] == "tool" for turn in line["turns"]))
    assert whole["calls_ratio"] == mean(lambda line: sum(turn["role"] == "tool" for turn in line["turns"]))
    assert whole["turns"] == mean(lambda line: sum(turn["role"] == "assistant" for turn in line["turns"]))
    assert whole["tokens_sampled"] == mean(lambda line: line["tokens"]["sampled"])
    assert 0 < whole["search_ratio"] < 1, "the base model must try both, or this shows nothing"


def test_table_goes_to_the_screen(miniature, tmp_path, capsys):
    run(miniature, tmp_path / "out", limit=2)
    shown = capsys.readouterr().out
    assert "toy: 6 questions\n" in shown and "95 % interval" in shown and "recall" in shown and "familiar (2)" in shown
    assert "Here every category has the same weight; train.py weights them as in training.\n" in shown


def test_a_benchmark_is_shown_beside_the_published_rows(miniature, tmp_path, capsys):
    data = shutil.copytree(questions(tmp_path / "made").parent, tmp_path / "civqa_test") / "data.jsonl"
    data = data.rename(data.with_name("gimmick_civqa.jsonl"))
    run(miniature, tmp_path / "out", data=data, search="none")
    shown = capsys.readouterr().out
    assert "GRPO-7B, search [1]" in shown and "[1] blog, Gimmick-CIVQA\n" in shown
    assert "51.85" in shown and "FVQA-test" not in shown
    assert max(map(len, shown.split("\n\n")[1].splitlines())) <= 80, "the table is wider than a terminal"


# ---- modes ----------------------------------------------------------------------------------------------------------


def test_direct_never_searches_and_rag_always_does(miniature, tmp_path):
    direct = run(miniature, tmp_path / "direct", mode="direct")
    assert direct.results["toy"]["search_ratio"] == direct.results["toy"]["calls_ratio"] == 0
    assert all(len(line["turns"]) == 1 for line in direct.lines)
    rag = run(miniature, tmp_path / "rag", mode="rag")
    assert rag.results["toy"]["search_ratio"] == rag.results["toy"]["search_ratio_image"] == 1
    assert all(line["turns"][0]["text"] == toy.LOOK_IT_UP and line["turns"][0]["forced"] for line in rag.lines)
    assert all(line["turns"][1]["observation"]["titles"] for line in rag.lines)


def rag_script(*argv) -> Script:
    script = evaluation.rag_script(parse([*argv, "--mode", "rag", "--data", "fvqa", "--model", "y"], EvalConfig), None)
    return script(None, 0)


def test_rag_forces_what_the_limits_allow_and_leaves_the_query_to_the_model():
    image, query, answer = (PROMPTS / "real" / "rag.txt").read_text().splitlines()
    assert rag_script("--recipe", "paper") == Script([image], [query, answer])
    assert rag_script("--recipe", "blog") == Script([image], [answer])
    assert rag_script("--recipe", "paper", "--max-turns", "2") == Script([image], [answer])
    assert rag_script("--recipe", "paper", "--max-images", "0") == Script([], [query, answer])
    assert image.endswith("<search><img></search>") and query.endswith("<text_search>") and "</reason>" not in answer


def test_rag_words_of_ones_own(miniature, tmp_path, capsys):
    prompts = shutil.copytree(PROMPTS / "toy", tmp_path / "prompts")
    (prompts / "rag.txt").write_text("<reason> now . </reason> <search><img></search>\nx\n<reason> results say so")
    found = run(miniature, tmp_path / "out", mode="rag", prompts=prompts, limit=2)
    for line in found.lines:
        assert line["turns"][0]["text"].startswith("<reason> now .")
        assert line["turns"][2]["text"].startswith("<reason> results say so")
    (prompts / "rag.txt").write_text("one line")
    refused(capsys, arguments(miniature, tmp_path / "other", mode="rag", prompts=prompts), "rag.txt: 1 lines")


@pytest.mark.parametrize("thinking", ["off", "on"])
def test_calls_in_json_are_not_made_or_their_results_stand_elsewhere(miniature_qwen3, tmp_path, thinking):
    """Whole evaluations in the grammar of Qwen3-VL's template, by a model of that architecture."""
    found = run(
        miniature_qwen3, tmp_path / "out", mode="rag", data=questions(tmp_path / "made"), search="none", max_turns=3,
        grammar="hermes", prompts="hermes", thinking=thinking, max_texts=1, max_tokens=3000, limit=3,
    )  # fmt: skip
    assert found.results[str(tmp_path / "made/data.jsonl")]["search_ratio_image"] == 1
    for line in found.lines:
        turns = [turn["text"] for turn in line["turns"]]
        assert line["turns"][0]["action"] == "image_search" and ("</think>" in turns[0]) == (thinking == "on")
        assert "<tool_response>\nimage_search found nothing.\n</tool_response>" in turns[1]
        assert turns[1].endswith("assistant\n" + "<think>\n" * (thinking == "on"))
        assert '{"name": "text_search", "arguments": {"query": "' in turns[2]


def test_the_toy_world_is_asked_in_json(miniature, tmp_path, capsys):
    refused(capsys, arguments(miniature, tmp_path / "out", grammar="hermes"), "the toy world speaks in tags")
    refused(capsys, arguments("", tmp_path / "out", data="x.jsonl", grammar="hermes"), "the toy world speaks in tags")


@pytest.mark.skipif(not (FVQA.exists() and TRANSCRIPTS.exists()), reason=f"{FVQA} and {TRANSCRIPTS.name} are not there")
@pytest.mark.parametrize("mode", ["search", "direct", "rag"])
def test_real_questions_with_replayed_searches(miniature, tmp_path, mode):
    found = run(
        miniature, tmp_path / "out", mode=mode, data=FVQA, search=f"replay:{TRANSCRIPTS}", max_turns=3, max_texts=1,
        max_tokens=3000, limit=6,
    )  # fmt: skip
    result = found.results[str(FVQA)]
    assert result["n"] == 6 and set(result["by_category"]) == {"search_free", "search_required"}
    if mode == "rag":
        assert result["search_ratio"] == 1 and result["search_recall"] == 1 and result["search_precision"] == 0.5
        assert {turn["observation"]["source"] for line in found.lines for turn in line["turns"][1:2]} == {"replay"}


# ---- several data sets, limits, going on ----------------------------------------------------------------------------


def test_several_data_sets_are_kept_apart(miniature, tmp_path):
    one, two = questions(tmp_path / "one", 3, "x"), questions(tmp_path / "two", 5, "y")
    found = run(miniature, tmp_path / "out", data=[one, two], search="none", limit=0)
    assert {name: result["n"] for name, result in found.results.items()} == {str(one): 3, str(two): 5}
    limited = run(miniature, tmp_path / "limited", data=[one, two], search="none", limit=4)
    assert [result["n"] for result in limited.results.values()] == [3, 4]
    texts = [[turn["text"] for turn in line["turns"]] for line in found.lines[:7]]
    assert [[turn["text"] for turn in line["turns"]] for line in limited.lines] == texts


def test_samples_depend_on_the_folder_of_the_data(miniature, tmp_path):
    """The same questions with the same seed have the same answers on another machine."""
    said = []
    for folder in (tmp_path / "here", tmp_path / "there"):
        folder.mkdir()
        data = questions(folder / "one", 3, "x")
        found = run(miniature, folder / "out", data=data, search="none", limit=0, temperature=1)
        said.append(texts(found))
    assert said[0] == said[1]


def test_an_evaluation_goes_on_where_it_was_cut_even_within_a_line(miniature, first, tmp_path, monkeypatch):
    out = Path(shutil.copytree(first, tmp_path / "out"))
    whole = (out / "episodes.jsonl").read_bytes()
    (out / "results.json").unlink()
    cut = sum(len(line) + 1 for line in whole.split(b"\n")[:7]) + 40
    (out / "episodes.jsonl").write_bytes(whole[:cut])
    rolled, roll_out = [], evaluation.roll_out
    monkeypatch.setattr(
        evaluation, "roll_out", lambda name, rows, *more: rolled.extend(rows) or roll_out(name, rows, *more)
    )
    argv = arguments(miniature, out, temperature=1)
    evaluation.main(argv)
    assert rolled == [7, 8, 9, 10, 11]
    assert (out / "results.json").read_bytes() == (first / "results.json").read_bytes()
    assert texts(Run(out)) == texts(Run(first))
    evaluation.main(argv)
    assert rolled == [7, 8, 9, 10, 11], "what is finished is not done again"


def test_small_batches_give_the_same(miniature, first, tmp_path):
    small = run(miniature, tmp_path / "small", temperature=1, slots=2)
    assert small.results == Run(first).results


def test_interrupted_it_keeps_whole_batches_and_goes_on(miniature, first, tmp_path, monkeypatch, capsys):
    roll_out, calls = evaluation.roll_out, []

    def once(*given):
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
        return roll_out(*given)

    monkeypatch.setattr(evaluation, "roll_out", once)
    argv = arguments(miniature, tmp_path / "out", temperature=1, slots=2)
    with pytest.raises(SystemExit) as stop:
        evaluation.main(argv)
    assert stop.value.code == 143 and not (tmp_path / "out" / "results.json").exists()
    assert len((tmp_path / "out" / "episodes.jsonl").read_text().splitlines()) == 4
    evaluation.main(argv)
    assert "4 questions are done already" in capsys.readouterr().out
    assert Run(tmp_path / "out").results == Run(first).results


def test_other_options_do_not_go_on_in_its_folder(miniature, first, tmp_path, capsys):
    before = {file.name: file.read_bytes() for file in first.iterdir() if file.is_file()}
    refused(capsys, arguments(miniature, first), "--temperature (was 1.0, is 0.0)")
    refused(capsys, arguments(miniature, first, temperature=1, mode="rag"), "--mode")
    (tmp_path / "thesis.tex").write_text("years of work")
    refused(capsys, arguments(miniature, tmp_path), "holds no config.json")
    assert {file.name: file.read_bytes() for file in first.iterdir() if file.is_file()} == before


def test_data_or_prompts_that_changed_under_their_names_do_not_go_on(miniature, tmp_path, capsys):
    data, prompts = questions(tmp_path / "data", 3), shutil.copytree(PROMPTS / "toy", tmp_path / "prompts")
    how = dict(data=data, search="none", prompts=prompts)
    run(miniature, tmp_path / "out", **how)
    os.utime(data, (1, 1))
    run(miniature, tmp_path / "out", **how)
    whole = data.read_text()
    data.write_text(whole + whole.splitlines()[0] + "\n")
    refused(capsys, arguments(miniature, tmp_path / "out", **how), "data.jsonl has changed")
    data.write_text(whole)
    (prompts / "direct.txt").write_text("{question} and why ?")
    refused(capsys, arguments(miniature, tmp_path / "out", **how), "direct.txt has changed")


def test_adapter_is_not_used_or_changes_in_the_middle(miniature, first, tmp_path, capsys):
    adapter = random_adapter(tmp_path / "adapter", miniature)
    out = tmp_path / "out"
    assert texts(run(miniature, out, temperature=1, adapter=adapter)) != texts(Run(first))
    refused(capsys, arguments(miniature, tmp_path / "no", adapter=out), f"--adapter {out} has no adapter_config.json")
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x07")
    argv = arguments(miniature, out, temperature=1, adapter=adapter)
    refused(capsys, argv, f"--adapter {adapter}/adapter_model.safetensors has changed")


def test_second_evaluation_in_a_folder_joins_the_first(miniature, first, tmp_path, capsys):
    out = Path(shutil.copytree(first, tmp_path / "out"))
    before = (out / "episodes.jsonl").read_bytes()[:-9]
    (out / "episodes.jsonl").write_bytes(before)
    lock = Lock(out)
    refused(capsys, arguments(miniature, out, temperature=1), f"--out {out}: another run is at work in it")
    lock.release()
    assert (out / "episodes.jsonl").read_bytes() == before


def test_folder_removed_under_an_evaluation_ends_in_a_traceback(miniature, tmp_path, monkeypatch, capsys):
    out, roll_out = tmp_path / "out", evaluation.roll_out
    monkeypatch.setattr(evaluation, "roll_out", lambda *given: shutil.rmtree(out) or roll_out(*given))
    refused(capsys, arguments(miniature, out, limit=2), "removed, moved or replaced", ends=True)
    assert not out.exists()


@pytest.mark.parametrize("line", ["7", '{"data": "toy", "row": 3}', '{"data": "to'])
def test_damaged_line_of_an_evaluation_ends_in_a_traceback(miniature, first, tmp_path, capsys, line):
    out = Path(shutil.copytree(first, tmp_path / "out"))
    lines = (out / "episodes.jsonl").read_text().splitlines()
    (out / "episodes.jsonl").write_text("\n".join([*lines[:4], line, *lines[5:]]) + "\n")
    refused(capsys, arguments(miniature, out, temperature=1), "episodes.jsonl: line 5 is damaged")


def test_a_model_of_no_numbers_has_an_accuracy(miniature, tmp_path, capsys):
    spoilt = shutil.copytree(miniature, tmp_path / "spoilt")
    weights = load_file(spoilt / "model.safetensors")
    weights["visual.merger.ln_q.weight"][0] = float("inf")
    save_file(weights, spoilt / "model.safetensors")
    refused(capsys, arguments(spoilt, tmp_path / "out"), "visual.merger.ln_q.weight holds NaN or infinite numbers")


@pytest.mark.slow
def test_two_ranks_write_the_same_results(miniature, first, tmp_path):
    from crew import environment, free_port

    port, script = free_port(), Path(evaluation.__file__)
    argv = [sys.executable, str(script), *arguments(miniature, tmp_path / "out", temperature=1)]
    ranks = [
        subprocess.Popen(argv, env=os.environ | environment(rank, 2, port) | {"OMP_NUM_THREADS": "1"})
        for rank in range(2)
    ]
    assert [rank.wait(200) for rank in ranks] == [0, 0]
    assert (tmp_path / "out" / "results.json").read_bytes() == (first / "results.json").read_bytes()
    assert [line["row"] for line in Run(tmp_path / "out").lines] == list(range(12))


def test_text_that_is_no_unicode_does_not_end_an_evaluation(miniature, tmp_path):
    """JSON can say half a surrogate pair, UTF-8 cannot."""
    data = questions(tmp_path / "data", 2)
    data.write_text(data.read_text().replace("what is", "what \\ud800 is"))
    found = run(miniature, tmp_path / "out", data=data, search="none")
    assert [line["question"] for line in found.lines] == ["what ? is this ?"] * 2


# ---- the judge ------------------------------------------------------------------------------------------------------


def test_a_question_that_was_not_asked_is_a_wrong_answer_in_silence(miniature, tmp_path, capsys, monkeypatch):
    data = questions(tmp_path / "data")
    text = data.read_text().splitlines()
    data.write_text("\n".join([text[0].replace("what is", "what is " * 120), *text[1:]]))
    script = lambda example, sample: Script(["what is this ? " * 40] if example.id == "q1" else [])  # noqa: E731
    monkeypatch.setattr(evaluation, "rag_script", lambda *given: script)
    found = run(miniature, tmp_path / "out", data=data, search="none", mode="rag")
    (result,) = found.results.values()
    cut = sum(line["status"] == "length" for line in found.lines) - 1
    assert (result["n"], result["not_asked"], result["cut"]) == (4, 1, cut) and cut >= 1
    assert result["by_category"]["made"]["not_asked"] == 1
    shown = capsys.readouterr()
    assert f"WARNING: --data {data}: 1 of 4 prompts do not fit --max-tokens 128" in shown.err and "(q0)" in shown.err
    assert "WARNING: 1 of 4 prompts do not fit --max-tokens: they count as wrong" in shown.out
    assert f"WARNING: {cut} of 4 rollouts ran out of --turn-tokens or --max-tokens: they count as wrong" in shown.out
    assert f"(1 not asked, {cut} cut: counted as wrong)" in (tmp_path / "out" / "report.html").read_text()
    none = f"--data {data}: no prompt can fit --max-tokens 9"
    refused(capsys, arguments(miniature, tmp_path / "none", data=data, search="none", max_tokens=9), none)
    assert not (tmp_path / "none").exists()


def test_judge_is_asked_once_and_set_beside_exact_match(miniature, tmp_path, monkeypatch, capsys):
    asked = []

    def complete(messages):
        asked.append(messages)
        return "Verdict: CORRECT"

    monkeypatch.setattr(evaluation.Output, "_judge", lambda self: complete)
    argv = dict(judge="http://127.0.0.1:1", judge_model="fake")
    found = run(miniature, tmp_path / "out", **argv).results["toy"]
    answered = [line for line in Run(tmp_path / "out").lines if line["answer"]]
    assert len(asked) == len({json.dumps(m) for m in asked}) <= len(answered)
    assert found["accuracy_judge"] == pytest.approx(len(answered) / 12) and found["judge_failures"] == 0
    right = sum(line["reward_parts"]["accuracy"] for line in Run(tmp_path / "out").lines)
    assert found["judge_agreement"] == pytest.approx(1 - (len(answered) - right) / 12)
    assert "the judge agrees with exact match" in capsys.readouterr().out
    n = len(asked)
    assert run(miniature, tmp_path / "out", **argv).results["toy"] == found and len(asked) == n


def test_judge_that_is_down_is_counted_and_said(miniature, tmp_path, monkeypatch, capsys):
    def complete(messages):
        raise OSError("connection refused")

    monkeypatch.setattr(evaluation.Output, "_judge", lambda self: complete)
    found = run(miniature, tmp_path / "out", judge="http://127.0.0.1:1", judge_model="fake").results["toy"]
    answered = sum(bool(line["answer"]) for line in Run(tmp_path / "out").lines)
    assert found["judge_failures"] == answered > 0
    shown = capsys.readouterr().out
    assert "connection refused" in shown and f"WARNING: the judge gave no verdict on {answered}" in shown


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(mode="guess"), "guess"),
        (dict(data="nowhere.jsonl", search="none"), "nowhere.jsonl"),
        (dict(data="file.csv", search="none"), "file.csv"),
        (dict(search="telepathy"), "telepathy"),
        (dict(judge="http://127.0.0.1:1"), "--judge-model"),
        (dict(model="/nowhere"), "/nowhere"),
        (dict(format="cifar", data="nowhere.jsonl", search="none"), "cifar"),
    ],
)
def test_wrong_option_is_one_line_and_no_folder(capsys, miniature, tmp_path, changes, said):
    refused(capsys, arguments(**{"model": miniature, "out": tmp_path / "out", **changes}), said)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("variable", ["OPENAI_API_KEY", "JUDGE_API_KEY"])
def test_a_judges_bad_key_is_told_after_the_last_question(capsys, miniature, tmp_path, monkeypatch, variable):
    monkeypatch.setenv(variable, "two words")
    argv = arguments(miniature, tmp_path / "out", judge="http://127.0.0.1:1", judge_model="fake")
    refused(capsys, argv, variable)
    assert not (tmp_path / "out").exists()


def test_broken_picture_is_named_before_anything_is_written(capsys, miniature, tmp_path):
    data = questions(tmp_path / "data")
    (tmp_path / "data" / "4.png").write_bytes(b"no picture")
    argv = dict(data=data, search="none", limit=0)
    refused(capsys, arguments(miniature, tmp_path / "out", **argv), "row 4, column image")
    assert not (tmp_path / "out").exists()
    assert run(miniature, tmp_path / "out", **argv | {"limit": 4}).results[str(data)]["n"] == 4
