"""`train.py` as a user runs it, on a base model that was made in seconds (conftest.py); and once for real (slow)."""

import dataclasses
import errno
import json
import math
import os
import re
import shutil
import signal
import sys
import zlib
from collections import Counter
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import documented, edit_json, picture_bytes, random_adapter, tiny_model
from safetensors.torch import load_file, save_file

import train
from mmsr import lora, reward
from mmsr.attention import Packed
from mmsr.batch import Batch
from mmsr.chat import PROMPTS, Action, Chat
from mmsr.config import Config, parse
from mmsr.disk import TOKENIZER, disk_needed
from mmsr.engine import Engine, GeneratedSequence, SequenceGroup
from mmsr.episode import Episode, Example
from mmsr.grpo import LossOptions
from mmsr.lora import linear_layers
from mmsr.model import logits, mrope_positions
from mmsr.pretrained.adapter import base_digest, read_adapter
from mmsr.pretrained.config_json import read_config
from mmsr.pretrained.load import load, skeleton
from mmsr.pretrained.save import save
from mmsr.report import output
from mmsr.report.alarms import NEEDED
from mmsr.report.html import count_rollout, counts_of_step, write_report
from mmsr.report.metrics import _extras
from mmsr.search.store import Budget
from mmsr.setup import policy
from mmsr.system.errors import UserError
from mmsr.system.files import Lock
from mmsr.system.parallel import SINGLE
from mmsr.tools import IMAGE_SEARCH, search_tools
from mmsr.toy import base as toy_base
from mmsr.toy import world as toy
from mmsr.update import MasterWeights, Trainer
from mmsr.vision import load_image

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
FVQA, TRANSCRIPTS = SHARED / "fvqa_sample.parquet", SHARED / "mmsearch_r1_7b_transcripts.jsonl"

SMALL = dict(
    recipe="toy", toy="basic", data="toy", search="toy", steps=2, questions=4, mini_batch=4, group_size=4, eval_size=3
)

METRICS = {
    *("step", "reward", "accuracy", "format", "search_ratio", "search_ratio_image", "search_ratio_text"),
    *(
        "tool_calls",
        "tool_failures",
        "tool_errors",
        "response_tokens",
        "zero_std_groups",
        "loss",
        "kl",
        "entropy",
        "clip_fraction",
        "logp_gap",
    ),
    *("logp_gap_max", "grad_norm", "lr", "seconds", "tokens", "images"),
}
EVALUATION = {"n", "accuracy", "search_ratio", "search_ratio_image", "search_ratio_text", "reward"}
ROLLOUT = {
    *("id", "group", "sample", "question", "answers", "category", "status", "turns", "answer", "reward"),
    *("reward_parts", "advantage", "tokens"),
}


def arguments(model, out, **changes) -> list[str]:
    given = {"model": model, **SMALL, "out": out, **changes}
    argv = []
    for name, value in given.items():
        option = "--" + name.replace("_", "-")
        argv += [option] if value is True else [option, str(value)]
    return argv


class Run:
    """What a run left in its folder."""

    def __init__(self, out: Path):
        self.out = out
        self.lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        self.steps = [line for line in self.lines if "reward" in line]
        self.evaluations = [line for line in self.lines if "eval" in line]
        self.rollouts = [
            [json.loads(line) for line in file.read_text().splitlines()]
            for file in sorted((out / "rollouts").iterdir())
        ]

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.out / "model" / "model.safetensors")

    @property
    def untimed(self) -> list[dict]:
        return [{key: value for key, value in line.items() if key != "seconds"} for line in self.lines]


def run(model, out, **changes) -> Run:
    train.main(arguments(model, out, **changes))
    return Run(out)


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module", autouse=True)
def _worlds_are_made_once():
    """Rendering a world's pictures takes longer than a small run. That it is a function of the seed: test_toy.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, "World", lru_cache(toy.World))
        yield


@pytest.fixture(scope="module")
def first(miniature, tmp_path_factory) -> Run:
    return run(miniature, tmp_path_factory.mktemp("runs") / "first")


@pytest.fixture
def every_other_right(monkeypatch):
    """A scorer by which the odd samples of a group are right: every group has something to learn."""
    monkeypatch.setattr(reward, "answer_score", lambda episode, rule: float(episode.sample % 2))


def refused(capsys, model, out, said, **changes) -> str:
    """Exit status 2, one line on standard error with `said` in it, and no output folder."""
    with pytest.raises(SystemExit) as stop:
        train.main(arguments(model, out, **changes))
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("train.py: ") and err.count("\n") == 1 and err.endswith("\n"), err
    assert "Traceback" not in err and said in err
    assert not out.exists()
    return err


# ---- what a run writes ----------------------------------------------------------------------------------------------


def test_a_run_writes_more_or_much_less_than_the_disk_plan_says(first, miniature):
    config = parse(arguments(miniature, first.out))
    planned = disk_needed(config, read_config(miniature), item=4)
    assert {part for part in planned if planned[part]} == {"checkpoints", "model", "rollouts", "pictures", "report"}
    folders = {}
    for name in planned:
        files = (first.out / name).rglob("*")
        folders[name] = sum(file.stat().st_size for file in files if file.is_file())
    assert 0.9 * planned["checkpoints"] < folders["checkpoints"] <= planned["checkpoints"]
    assert planned["model"] - TOKENIZER < folders["model"] <= planned["model"]
    assert planned["rollouts"] / 6 < folders["rollouts"] <= planned["rollouts"]


def test_run_writes_every_file_of_the_contract(first):
    assert {"config.json", "metrics.jsonl", "rollouts", "model"} <= {file.name for file in first.out.iterdir()}
    assert {file.name for file in (first.out / "rollouts").iterdir()} == {"step-000001.jsonl", "step-000002.jsonl"}
    config = json.loads((first.out / "config.json").read_text())
    assert config["group_size"] == 4 and config["seed"] == 0


def test_metrics_have_every_key_of_the_contract(first):
    assert [line["step"] for line in first.steps] == [1, 2]
    for line in first.steps:
        assert METRICS <= line.keys()
        assert line["seconds"].keys() >= {"rollout", "reward", "update"}
        assert line["tokens"].keys() == {"prefilled", "prefilled_unique", "sampled", "trained", "trained_unique"}
        assert line["images"].keys() == {"distinct", "encoded"}
        flat = [*line.values(), *line["seconds"].values(), *line["tokens"].values(), *line["images"].values()]
        assert all(math.isfinite(value) for value in flat if not isinstance(value, dict))


def test_metrics_agree_with_the_rollouts(first):
    for line, episodes in zip(first.steps, first.rollouts):
        n = len(episodes)
        assert n == 16 and sorted({(e["group"], e["sample"]) for e in episodes}) == [
            (g, s) for g in range(4) for s in range(4)
        ]

        def mean(value, episodes=episodes, n=n):
            return pytest.approx(sum(map(value, episodes)) / n)

        assert line["reward"] == mean(lambda e: e["reward"])
        assert line["accuracy"] == mean(lambda e: e["reward_parts"]["accuracy"])
        assert line["format"] == mean(lambda e: e["reward_parts"]["format"])
        assert line["search_ratio"] == mean(lambda e: any(turn["role"] == "tool" for turn in e["turns"]))
        assert line["response_tokens"] == mean(lambda e: e["tokens"]["sampled"])
        assert line["tokens"]["sampled"] == sum(e["tokens"]["sampled"] for e in episodes)
        groups = [{e["reward"] for e in episodes if e["group"] == g} for g in range(4)]
        assert line["zero_std_groups"] == sum(len(rewards) == 1 for rewards in groups)


def test_rollout_lines_have_every_key_of_the_contract(first):
    turns = [turn for episodes in first.rollouts for e in episodes for turn in e["turns"]]
    assert all(ROLLOUT <= e.keys() for episodes in first.rollouts for e in episodes)
    assert all({"role", "text", "action", "query"} <= turn.keys() for turn in turns)
    seen = [turn["observation"] for turn in turns if turn["role"] == "tool"]
    keys = {"ok", "error", "source", "titles", "urls", "thumbnails", "text", "images", "seconds", "cached"}
    assert seen and all(observation.keys() == keys for observation in seen)


def test_the_page_about_files_names_other_keys_than_the_files_have(first):
    assert all(line.keys() == documented("`metrics.jsonl`") for line in first.steps)
    assert all(e.keys() == documented("`rollouts/") for episodes in first.rollouts for e in episodes)


def test_evaluations_stand_before_the_first_step_and_after_the_last(first):
    assert (
        [line["step"] for line in first.lines] == [0, 1, 2, 2]
        and "eval" in first.lines[0]
        and "eval" in first.lines[-1]
    )
    for line in first.evaluations:
        for mode in ("eval", "eval_sampled"):
            assert list(line[mode]) == ["familiar", "unfamiliar", "held_out"]
            assert all(found.keys() == EVALUATION and found["n"] == 3 for found in line[mode].values())
    fixed = first.lines[0]
    assert all(found["search_ratio"] == 1 for found in fixed["always_search"].values())
    assert all(found["search_ratio"] == 0 for found in fixed["never_search"].values())


@pytest.mark.slow
def test_evaluation_every_so_many_steps(miniature, tmp_path):
    found = run(miniature, tmp_path / "out", steps=3, eval_every=1, questions=2, mini_batch=2)
    assert [line["step"] for line in found.evaluations] == [0, 1, 2, 3]


def test_nothing_is_trained_or_encoded_twice(first):
    for line in first.steps:
        tokens, images = line["tokens"], line["images"]
        assert 0 < tokens["trained"] == tokens["trained_unique"]
        assert tokens["prefilled_unique"] <= tokens["prefilled"] <= 1.05 * tokens["prefilled_unique"]
        assert images["distinct"] == 4 and images["encoded"] <= 2 * images["distinct"]


def test_trainer_and_sampler_agree_on_log_probabilities(first):
    assert all(0 <= line["logp_gap"] <= line["logp_gap_max"] <= 2e-6 for line in first.steps)


# ---- dynamic sampling ------------------------------------------------------------------------------------------------


@pytest.fixture
def half_too_easy(monkeypatch):
    """Of half of the questions every answer is right, and searches cost nothing: their groups teach nothing."""

    def answer_score(episode, rule) -> float:
        return float(episode.sample % 2 or zlib.crc32(episode.example.image) % 2)

    monkeypatch.setattr(reward, "answer_score", answer_score)
    monkeypatch.setattr(reward, "format_score", lambda episode, rule, well_formed: 0.0)


def test_groups_that_teach_nothing_stay_in_the_batch_or_go_uncounted(miniature, tmp_path, half_too_easy, monkeypatch):
    seeds, roll_out = [], train.Setup.roll_out

    def noted(setup, examples, group_size, seed, *more, **how):
        seeds.append(seed)
        return roll_out(setup, examples, group_size, seed, *more, **how)

    monkeypatch.setattr(train.Setup, "roll_out", noted)
    found = run(miniature, tmp_path / "out", resample=8, penalty=0)
    drawn = [seed for seed in seeds if isinstance(seed[1], int)]  # not of an evaluation
    assert len(drawn) == len(set(drawn)) == sum(line["resampled"]["draws"] for line in found.steps), "other noise"
    for line, episodes in zip(found.steps, found.rollouts):
        said = line["resampled"]
        assert said["zero_std_first"] > 0 and said["draws"] > 1 and not said["short_of_budget"]
        assert line["zero_std_groups"] == 0
        groups = {number: [e for e in episodes if e["group"] == number] for number in range(4 + said["replaced"])}
        assert len(episodes) == 16 + 4 * said["replaced"] and all(len(group) == 4 for group in groups.values())
        for number, group in groups.items():
            rewards = {e["reward"] for e in group}
            assert (len(rewards) > 1) == (number < 4) == all(e["trained"] for e in group)
            assert number < 4 or not any(e["advantage"] for e in group)
        assert len({e["id"] for e in episodes}) == len(groups), "questions of the same step are new ones"
        assert line["reward"] == pytest.approx(sum(e["reward"] for e in episodes) / len(episodes))
        assert line["tokens"]["sampled"] == sum(e["tokens"]["sampled"] for e in episodes)
    plain = run(miniature, tmp_path / "plain", penalty=0)
    assert plain.rollouts[0][0]["id"] == found.rollouts[0][0]["id"], "the first draw is that of a run without"
    assert plain.steps[0]["zero_std_groups"] == found.steps[0]["resampled"]["zero_std_first"]


def test_pictures_of_replaced_groups_stay_in_memory_or_others_are_encoded_twice(
    miniature, tmp_path, half_too_easy, monkeypatch
):
    """A frozen tower, whose features last for the step: those of the batch are there once, the others are forgotten."""
    kept, keep = [], train.Setup.keep_features

    def keep_features(setup, episodes):
        keep(setup, episodes)
        kept.append((len(setup.features), len({image.key for e in episodes for _, image in e.images})))

    monkeypatch.setattr(train.Setup, "keep_features", keep_features)
    found = run(miniature, tmp_path / "out", resample=3, penalty=0, freeze="vision", mini_batch=2)
    assert kept and all(features == pictures for features, pictures in kept)
    for line in found.steps:
        assert line["images"]["encoded"] == line["images"]["distinct"] == 4 + line["resampled"]["replaced"]


@pytest.mark.slow
def test_a_signal_in_a_second_draw_loses_a_step_or_changes_the_bits(
    miniature, tmp_path, half_too_easy, monkeypatch, capsys
):
    given = dict(resample=3, penalty=0, save_every=1)
    whole = run(miniature, tmp_path / "whole", **given)
    roll_out = train.roll_out

    def signalled(step, draw, *more):
        if (step, draw) == (2, 1):
            os.kill(os.getpid(), signal.SIGTERM)
        return roll_out(step, draw, *more)

    monkeypatch.setattr(train, "roll_out", signalled)
    with pytest.raises(SystemExit) as stop:
        train.main(arguments(miniature, tmp_path / "out", **given))
    assert stop.value.code == 128 + signal.SIGTERM and len(Run(tmp_path / "out").steps) == 1
    monkeypatch.setattr(train, "roll_out", roll_out)
    again = run(miniature, tmp_path / "out", resume=True, **given)
    assert again.untimed == whole.untimed and equal(again.weights, whole.weights)
    assert [[e["id"] for e in episodes] for episodes in again.rollouts] == [
        [e["id"] for e in episodes] for episodes in whole.rollouts
    ]


def test_a_loss_of_the_command_line_does_not_reach_the_trainer(miniature, tmp_path):
    argv = arguments(miniature, tmp_path / "out", loss="gspo", loss_norm="constant", clip_high=0.5, kl=0)
    config = parse([*argv, "--importance-cap", "2", "--importance-bound", "3"])
    trainer = train.make_trainer(train.open_setup(config))
    assert trainer.loss == LossOptions("gspo", 0.0, 3e-4, 0.5, "constant", config.max_tokens, 2.0, 3.0)


def test_the_overlong_penalty_of_a_run_is_not_in_its_rewards(miniature, tmp_path):
    found = run(miniature, tmp_path / "out", steps=1, overlong_buffer=100, overlong_penalty=0.5)
    limit = parse(arguments(miniature, tmp_path)).max_tokens
    for e in found.rollouts[0]:
        parts = e["reward_parts"]
        assert parts["overlong"] == 0.5 * min(max((e["tokens"]["total"] - limit + 100) / 100, 0), 1)
        rest = 0.9 * parts["accuracy"] + 0.1 * parts["format"] - parts["penalty"]
        assert e["reward"] == pytest.approx(rest - parts["overlong"])
    assert any(e["reward_parts"]["overlong"] for e in found.rollouts[0])


def test_rollouts_whose_tools_failed_count_as_shorter_or_end_a_run_with_a_wrong_reason(
    miniature, tmp_path, every_other_right, monkeypatch, capsys
):
    monkeypatch.setattr(toy.Web, "image_search", lambda self, *given: 1 / 0)
    found = run(miniature, tmp_path / "out", steps=1, fatal_errors=1, penalty=0)
    line, episodes = found.steps[0], found.rollouts[0]
    failed = [e for e in episodes if any(turn["role"] == "tool" for turn in e["turns"])]
    assert line["spared"] == len(failed) > 0
    assert all(e["advantage"] >= 0 for e in failed) and any(e["advantage"] < 0 for e in episodes)
    assert line["tokens"]["sampled"] == sum(e["tokens"]["sampled"] for e in episodes)
    assert line["response_tokens"] == pytest.approx(line["tokens"]["sampled"] / len(episodes))
    whole = run(miniature, tmp_path / "whole", steps=1, penalty=0).steps[0]
    assert line["tokens"]["trained"] < whole["tokens"]["trained"], "what follows a failure is not trained"


def test_dynamic_sampling_goes_on_for_ever_or_beyond_the_budget(
    miniature, tmp_path, half_too_easy, monkeypatch, capsys
):
    monkeypatch.setattr(reward, "answer_score", lambda episode, rule: 1.0)
    found = run(miniature, tmp_path / "out", resample=2, penalty=0, steps=1)
    said = found.steps[0]["resampled"]
    assert said == {"draws": 3, "replaced": 8, "zero_std_first": 4, "short_of_budget": False}
    assert found.steps[0]["zero_std_groups"] == 4
    monkeypatch.setattr(train, "affordable", lambda *given: False)
    found = run(miniature, tmp_path / "short", resample=2, penalty=0, steps=1)
    assert found.steps[0]["resampled"] == {"draws": 1, "replaced": 0, "zero_std_first": 4, "short_of_budget": True}
    assert "resample-budget" in found.steps[0]["alarms"] and "--resample would ask" in capsys.readouterr().err


@pytest.mark.parametrize("left, wanted, fits", [(90, 2, True), (90, 18, True), (90, 19, False), (0, 1, False)])
def test_a_draw_is_begun_that_the_paid_calls_do_not_do_for(left, wanted, fits):
    """10 questions have cost 50 calls so far."""
    setup = SimpleNamespace(spending=Budget(None, "run", total=left + 50), ranks=SINGLE)
    budget = setup.spending.left
    for _ in range(50):
        setup.spending.spend("serpapi")
    assert train.affordable(wanted, 10, budget, setup) == fits
    assert train.affordable(10**9, 10, math.inf, SimpleNamespace(spending=None))
    spent = SimpleNamespace(spending=Budget(None, "run", total=0), ranks=SINGLE)
    assert not train.affordable(1, 10, 0, spent), "what is spent before the step begins cannot be estimated from it"


# ---- the same again, and otherwise ----------------------------------------------------------------------------------


def test_same_seed_gives_the_same_bits(first, miniature, tmp_path):
    again = run(miniature, tmp_path / "again")
    assert not equal(first.weights, load_file(miniature / "model.safetensors")), "nothing was learnt"
    assert equal(first.weights, again.weights) and first.untimed == again.untimed
    for a, b in zip(first.rollouts, again.rollouts):
        assert [(e["id"], e["turns"][0]["text"], e["advantage"]) for e in a] == [
            (e["id"], e["turns"][0]["text"], e["advantage"]) for e in b
        ]


@pytest.mark.slow
def test_another_seed_gives_another_run(first, miniature, tmp_path):
    other = run(miniature, tmp_path / "other", seed=1)
    assert not equal(first.weights, other.weights)
    assert [e["id"] for e in first.rollouts[0]] != [e["id"] for e in other.rollouts[0]]


def test_every_step_has_randomness_of_its_own(miniature, tmp_path):
    """One example, no learning: with the same keys every step would sample the same rollouts again."""
    found = run(
        miniature,
        tmp_path / "out",
        lr=0,
        data=questions(tmp_path / "data", 1),
        search="none",
        questions=1,
        mini_batch=1,
    )
    said = [[turn["text"] for e in episodes for turn in e["turns"]] for episodes in found.rollouts]
    assert said[0] != said[1]


@pytest.mark.slow
def test_tools_in_threads_give_the_same_run(first, miniature, tmp_path):
    """Only the last bits may differ."""
    train.main([*arguments(miniature, tmp_path / "out"), "--no-deterministic"])
    found = Run(tmp_path / "out")
    assert [[e["turns"][-1]["text"] for e in step] for step in found.rollouts[:1]] == [
        [e["turns"][-1]["text"] for e in step] for step in first.rollouts[:1]
    ]
    assert all(line["logp_gap_max"] <= 1e-5 for line in found.steps)


@pytest.mark.slow
def test_kl_of_nought_loads_no_reference(miniature, tmp_path, monkeypatch):
    loaded = []
    monkeypatch.setattr(policy, "load", lambda *given: loaded.append(given) or load(*given))
    with_kl = run(miniature, tmp_path / "kl", kl=0.001)
    assert len(loaded) == 2 and with_kl.steps[1]["kl"] > 0
    without = run(miniature, tmp_path / "none", kl=0)
    assert len(loaded) == 3 and [line["kl"] for line in without.steps] == [0, 0]


@pytest.mark.slow
def test_mini_batches_make_several_updates_against_one_frozen_policy(
    miniature, tmp_path, monkeypatch, every_other_right
):
    taken, step = [], MasterWeights.step
    monkeypatch.setattr(MasterWeights, "step", lambda self, lr: taken.append(lr) or step(self, lr))
    found = run(miniature, tmp_path / "out", mini_batch=2, lr=3e-3, lr_schedule="constant")
    assert taken == [3e-3] * 4
    assert found.steps[0]["clip_fraction"] > 0, "the second update must be clipped against the policy that sampled"
    assert all(line["tokens"]["trained"] == line["tokens"]["trained_unique"] for line in found.steps)
    whole = run(miniature, tmp_path / "whole", lr=3e-3, lr_schedule="constant")
    assert [line["clip_fraction"] for line in whole.steps] == [0, 0] and len(taken) == 6


@pytest.mark.slow
def test_policy_moves_towards_what_was_rewarded(miniature, tmp_path, monkeypatch):
    """Search is made right and everything else wrong: the ratio must go up; and the other way round down."""
    ratios = {}
    for wanted in (0, 1):
        monkeypatch.setattr(
            reward, "answer_score", lambda episode, rule, w=wanted: float((episode.searches() > 0) == w)
        )
        changes = dict(steps=5, questions=8, mini_batch=8, lr=1e-3, lr_schedule="constant")
        found = run(miniature, tmp_path / str(wanted), **changes)
        ratios[wanted] = sum(line["search_ratio"] for line in found.steps[-3:]) / 3
    assert ratios[0] < 0.3 and ratios[1] > 0.75


def test_sft_imitates_the_right_rollouts_only(miniature, tmp_path, monkeypatch, every_other_right):
    chosen, step = [], Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda self, batches, lr: chosen.extend(batches) or step(self, batches, lr))
    found = run(miniature, tmp_path / "out", algorithm="sft")
    assert [{e.sample for e in batch} for batch in chosen] == [{1, 3}, {1, 3}]
    assert all(line["loss"] > 0 and line["kl"] == 0 and line["clip_fraction"] == 0 for line in found.steps)
    assert not equal(found.weights, load_file(miniature / "model.safetensors"))


def test_sft_with_nothing_right_changes_nothing_and_says_nothing(miniature, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reward, "answer_score", lambda episode, rule: 0.0)
    found = run(miniature, tmp_path / "out", algorithm="sft")
    assert equal(found.weights, load_file(miniature / "model.safetensors"))
    assert all(line["loss"] == 0 and line["tokens"]["trained"] == 0 for line in found.steps)
    assert all(line["alarms"] == ["untrained"] for line in found.steps)
    err = capsys.readouterr().err
    assert err.count("nothing was trained: none of 16 rollouts is right") == 2
    assert f"WARNING: no step trained a token: {tmp_path / 'out' / 'model'} has the weights" in err


def test_a_run_that_learns_nothing_goes_on_for_ever_and_resumed_it_counts_anew(
    miniature, tmp_path, monkeypatch, capsys, every_other_right
):
    def gone(self, *given):
        sys.exit("no key")

    monkeypatch.setattr(toy.Web, "image_search", gone)
    monkeypatch.setattr(Chat, "parse", lambda self, text: Action(IMAGE_SEARCH))  # all rollouts search
    options = dict(steps=9, save_every=1, eval_size=1, on_tool_error="drop", questions=1, mini_batch=1)
    for resume, done in ((), 2), (("--resume",), 3):
        with pytest.raises(SystemExit) as stop:
            train.main([*arguments(miniature, tmp_path / "out", max_skipped=done, **options), *resume])
        err = capsys.readouterr().err
        assert stop.value.code == 2 and len(Run(tmp_path / "out").steps) == done
        last = err.rstrip().splitlines()[-1]
        said = (
            f"train.py: {done} steps in a row trained nothing; in the last, nothing was trained: 4 of 4 were left out"
        )
        assert last.startswith(said) and "raise --max-skipped" in last
    assert Run(tmp_path / "out").steps[-1]["tool_errors"] == {"SystemExit: no key": 4}


def test_failed_tools_are_counted_told_of_and_can_be_left_out(
    miniature, tmp_path, monkeypatch, every_other_right, capsys
):
    def down(self, *given):
        raise OSError("down")

    monkeypatch.setattr(toy.Web, "image_search", down)
    told = run(miniature, tmp_path / "told", steps=1)
    calls = sum(turn["role"] == "tool" for e in told.rollouts[0] for turn in e["turns"])
    assert told.steps[0]["tool_failures"] == told.steps[0]["tool_calls"] == calls > 0
    assert f"step 1: {calls} of {calls} tool calls failed, most often: OSError: down" in capsys.readouterr().err
    assert "tool-error" not in {e["status"] for e in told.rollouts[0]}
    dropped = run(miniature, tmp_path / "dropped", steps=1, on_tool_error="drop", zero_std="keep")
    stopped = [e for e in dropped.rollouts[0] if e["status"] == "tool-error"]
    assert len(stopped) == dropped.steps[0]["tool_failures"] == calls
    assert all(e["advantage"] == 0 for e in stopped), "an episode that its tool broke must teach nothing"


@pytest.mark.skipif(not (FVQA.exists() and TRANSCRIPTS.exists()), reason=f"{FVQA} and {TRANSCRIPTS.name} are not there")
def test_forced_searches_replay_recorded_turns_in_half_of_each_group(miniature, tmp_path, every_other_right):
    found = run(
        miniature, tmp_path / "out", data=FVQA, search=f"replay:{TRANSCRIPTS}", force_searches=True, zero_std="keep",
        steps=1, questions=3, mini_batch=3, max_turns=3, max_texts=2, max_tokens=2500, eval_size=2, lr=1e-3,
    )  # fmt: skip
    recorded = {line["data_id"]: line["turns"] for line in map(json.loads, TRANSCRIPTS.read_text().splitlines())}
    forced = {0: 0, 1: 0}
    for episode in found.rollouts[0]:
        turns, searches = (
            episode["turns"],
            [t for t in recorded[episode["id"]] if "tool_result" in t and t["tool_result"]],
        )
        replayed = [turn for turn in turns if turn.get("forced")]
        assert [turn["text"] for turn in replayed] == [
            turn["response"] for turn in searches[: len(replayed)] if episode["sample"] < 2
        ]
        forced[episode["sample"] < 2] += len(replayed)
        if replayed and replayed[0]["action"] == "image_search":
            back = next(turn for turn in turns if turn["role"] == "tool")
            titles = searches[0]["tool_result"]["titles"]
            assert back["observation"]["titles"] == titles and back["observation"]["source"] == "replay"
            words = " ".join(title.split()[0] for title in titles if title.split() and title.split()[0].isalnum())
            assert all(word in back["text"] for word in words.split())
    assert forced[True] > 0 == forced[False]
    assert found.steps[0]["tokens"]["trained"] > 0
    assert not equal(found.weights, load_file(miniature / "model.safetensors"))


# ---- the model it leaves --------------------------------------------------------------------------------------------


def test_model_folder_decodes_in_transformers_as_in_our_engine(first, world):
    from transformers import Qwen2_5_VLForConditionalGeneration

    folder = first.out / "model"
    chat = Chat(folder, PROMPTS / "toy", search_tools(world.web, 1, 0))
    model, twin = load(folder), Qwen2_5_VLForConditionalGeneration.from_pretrained(folder).eval()
    suppressed = chat.suppressed_tokens(model.config.vocab_size)
    example = world.questions("familiar", 1, "transformers")[0]
    prompt = chat.prompt(example.question, load_image(example.image, 56 * 56, 56 * 56))
    engine = Engine(model, chat.stop_id, suppressed, slots=1, max_tokens=128, turn_tokens=32, temperature=0)
    sequence = GeneratedSequence(0)
    engine.submit([SequenceGroup(prompt.ids, prompt.images, [sequence])])
    while not engine.step():
        pass
    ids, image = torch.tensor([prompt.ids]), prompt.images[0][1]
    theirs = twin.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=image.patches,
        image_grid_thw=torch.tensor([(1, *image.grid)]), mm_token_type_ids=(ids == model.config.image_token_id).int(),
        do_sample=False, max_new_tokens=32, eos_token_id=chat.stop_id, pad_token_id=chat.stop_id,
        suppress_tokens=suppressed.nonzero()[:, 0].tolist(),
    )  # fmt: skip
    assert sequence.stopped and theirs[0, len(prompt.ids) :].tolist() == sequence.ids


def test_run_can_start_from_the_model_of_another(first, tmp_path):
    assert run(first.out / "model", tmp_path / "out", steps=1).steps[0]["step"] == 1


# ---- adapters, and frozen parts -------------------------------------------------------------------------------------

ADAPTERS = dict(lora=16, mini_batch=2, save_every=1, merge=True)


@pytest.fixture(scope="module")
def adapters(miniature, tmp_path_factory) -> Run:
    """Two steps of two updates each, with adapters in the decoder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reward, "answer_score", lambda episode, rule: float(episode.sample % 2))
        return run(miniature, tmp_path_factory.mktemp("runs") / "adapters", **ADAPTERS)


def adapter_of(found: Run) -> dict[str, torch.Tensor]:
    return load_file(found.out / "adapter" / "adapter_model.safetensors")


def test_a_run_with_adapters_writes_another_set_of_files_or_learns_nothing(adapters, miniature):
    assert {"adapter", "model", "checkpoints", "report.html"} <= {file.name for file in adapters.out.iterdir()}
    found = adapter_of(adapters)
    assert found and all(tensor.dtype == torch.float32 for tensor in found.values())
    assert all(tensor.any() for name, tensor in found.items() if "lora_B" in name), "it begins with zeros"
    assert adapters.steps[0]["kl"] > 0, "the second mini-batch of a step is some way from the reference"
    assert all(METRICS <= line.keys() and line["logp_gap_max"] <= 1e-5 for line in adapters.steps)
    base = load_file(miniature / "model.safetensors")
    moved = {name for name, weight in adapters.weights.items() if not torch.equal(weight, base[name])}
    assert moved and all(re.fullmatch(r"model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj\.weight", name) for name in moved)
    assert len(moved) == len(found) / 2


def test_a_picture_is_encoded_again_though_its_tower_is_not_trained(adapters, miniature, tmp_path, every_other_right):
    """By the rollouts alone: not for π_old of the second mini-batch, the KL reference, or the update."""
    frozen = run(miniature, tmp_path / "frozen", freeze="vision", mini_batch=2)
    for line in [*adapters.steps, *frozen.steps]:
        assert line["images"]["encoded"] == line["images"]["distinct"] == 4
    base = load_file(miniature / "model.safetensors")
    for name, weight in frozen.weights.items():
        assert torch.equal(weight, base[name]) == name.startswith("visual."), name


@pytest.mark.slow
def test_features_of_one_step_or_evaluation_are_kept_for_the_next(miniature, tmp_path, monkeypatch, every_other_right):
    counted = []

    def step(self, batches, lr):
        counted.append((set(self.features), {image.key for b in batches for e in b for _, image in e.images}))
        return whole(self, batches, lr)

    whole = Trainer.step
    monkeypatch.setattr(Trainer, "step", step)
    run(miniature, tmp_path / "out", lora=2, eval_every=1)
    assert len(counted) == 2
    for known, used in counted:
        assert known == used and len(used) == 4


def test_adapters_load_a_second_model_for_the_reference(miniature, tmp_path, monkeypatch):
    loaded = []
    monkeypatch.setattr(policy, "load", lambda *given: loaded.append(given) or load(*given))
    setup = train.open_setup(parse(arguments(miniature, tmp_path / "out", lora=2, dtype="bfloat16")))
    trainer = train.make_trainer(setup)
    assert len(loaded) == 1 and trainer.reference is trainer.model is setup.model
    for name, parameter in setup.model.named_parameters():
        assert parameter.requires_grad == lora.is_adapter(name)
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16)
    assert {"lora_A", "lora_B"} == {name.rpartition(".")[2] for name in trainer.optimizer.fp32_params}
    assert not trainer.optimizer.bf16_params


@pytest.mark.slow
def test_merged_model_gives_other_logits_in_transformers_than_its_adapter_here(adapters, miniature, world):
    from transformers import Qwen2_5_VLForConditionalGeneration

    argv = ["--model", miniature, "--adapter", adapters.out / "adapter", "--data", "toy"]
    model = policy.open_model(parse(list(map(str, argv))), miniature, torch.float32, SINGLE)
    twin = Qwen2_5_VLForConditionalGeneration.from_pretrained(adapters.out / "model").eval()
    example = world.questions("familiar", 1, "transformers")[0]
    chat = Chat(adapters.out / "model", PROMPTS / "toy", search_tools(world.web, 1, 0))
    prompt = chat.prompt(example.question, load_image(example.image, 56 * 56, 56 * 56))
    ids = torch.tensor(prompt.ids)
    where = mrope_positions(len(ids), [(at, image.grid) for at, image in prompt.images])[0]
    ((_, image),) = prompt.images
    index = (ids == model.config.image_token_id).nonzero()[:, 0]
    with torch.no_grad():
        features = model.encode_images([image])
        ours = model(ids, where, Packed([len(ids)], "cpu"), features, index, head_fn=logits)
        theirs = twin(
            input_ids=ids[None], position_ids=where[:, None], pixel_values=image.patches,
            image_grid_thw=torch.tensor([(1, *image.grid)]),
        ).logits[0]  # fmt: skip
        without = load(miniature)(ids, where, Packed([len(ids)], "cpu"), features, index, head_fn=logits)
    assert ((ours - theirs).norm() / theirs.norm()).item() < 2e-6
    assert ((without - theirs).norm() / theirs.norm()).item() > 1e-4, "the adapter should do something"


def test_an_adapter_answers_otherwise_in_an_evaluation_than_in_its_run(adapters, miniature, tmp_path):
    import eval as evaluation

    given = ["--recipe", "toy", "--toy", "basic", "--data", "toy", "--limit", "3"]
    for name, model in (
        ("adapter", ["--model", miniature, "--adapter", adapters.out / "adapter"]),
        ("model", ["--model", adapters.out / "model"]),
    ):
        evaluation.main([*given, *map(str, model), "--out", str(tmp_path / name)])
        results = json.loads((tmp_path / name / "results.json").read_text())["toy"]["by_category"]
        for category, row in adapters.evaluations[-1]["eval"].items():
            assert {key: results[category][key] for key in row} == row


@pytest.mark.parametrize(
    "changes",
    [
        dict(lora=16),
        pytest.param(dict(lora=4, lora_targets="vision"), marks=pytest.mark.slow),
        pytest.param(dict(freeze="vision"), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_resumed_run_with_frozen_weights_has_other_bits(miniature, tmp_path, every_other_right, changes):
    given = dict(save_every=1, mini_batch=2, eval_size=1, **changes)
    whole = run(miniature, tmp_path / "whole", **given)
    out = tmp_path / "again"
    shutil.copytree(whole.out, out)
    last = "checkpoints/step-000002"
    shutil.rmtree(out / last)
    again = run(miniature, out, resume=True, **given)
    assert again.untimed == whole.untimed
    for file in sorted((whole.out / last).glob("*.safetensors")):
        assert equal(load_file(file), load_file(out / last / file.name))
    results = [adapter_of(each) if "lora" in changes else each.weights for each in (whole, again)]
    assert equal(*results)


def test_parts_that_hold_no_adapter_cannot_be_frozen_beside_adapters(miniature, tmp_path, capsys):
    given = dict(lora=2, freeze="embedding", lora_targets="q_proj")
    setup = train.open_setup(parse(arguments(miniature, tmp_path / "out", **given)))
    assert lora.adapted(setup.model)
    said = "--freeze decoder leaves none of --lora-targets to train"
    refused(capsys, miniature, tmp_path / "out", said, **(given | {"freeze": "decoder"}))
    refused(capsys, miniature, tmp_path / "out", "--lora-targets wq", lora=2, lora_targets="wq")
    refused(capsys, miniature, tmp_path / "out", "--freeze tower", freeze="tower")


def test_a_checkpoint_of_adapters_holds_the_model(adapters):
    (file,) = (adapters.out / "checkpoints" / "step-000002").glob("*.safetensors")
    stored = load_file(file)
    assert all(lora.is_adapter(name) or name.startswith("optimizer.step") for name in stored), list(stored)
    trained = sum(tensor.nbytes for tensor in adapter_of(adapters).values())
    assert 3 * trained <= file.stat().st_size < 3.3 * trained


def test_a_resumed_run_takes_another_rank_or_scale(adapters, miniature, capsys):
    for name, value, was in (("lora", 8, "16"), ("lora_alpha", 16.0, "32.0"), ("lora_targets", "q_proj", "[]")):
        line = ended_with(capsys, arguments(miniature, adapters.out, resume=True, **(ADAPTERS | {name: value})))
        assert f"--{name.replace('_', '-')} (was {was}, is " in line


@pytest.mark.slow
def test_a_trained_adapter_is_trained_further_towards_the_base(adapters, miniature, tmp_path, every_other_right):
    """The reference is the policy that the run starts with: its first update is at no distance from it."""
    found = run(miniature, tmp_path / "out", adapter=adapters.out / "adapter")
    assert abs(found.steps[0]["kl"]) < 1e-9 < found.steps[1]["kl"]
    assert adapter_of(found).keys() == adapter_of(adapters).keys()
    assert not equal(adapter_of(found), adapter_of(adapters))
    assert found.evaluations[0]["eval"] == adapters.evaluations[-1]["eval"]


# ---- the report and the trackers ------------------------------------------------------------------------------------


def test_rollout_lines_hold_tokens_and_name_pictures_that_are_there(first):
    for rollout in (line for step in first.rollouts for line in step):
        assert (first.out / "images" / f"{rollout['image']}.jpg").is_file()
        for turn in (turn for turn in rollout["turns"] if turn["role"] == "assistant"):
            assert "".join(text for text, _, _ in turn["pieces"]).removesuffix("<|im_end|>") == turn["text"]
            assert all(mask == 1 and 0 <= chance <= 1 for _, mask, chance in turn["pieces"])
    assert "<title>" in (first.out / "report.html").read_text()


def test_conversations_outgrow_their_slots_and_nobody_is_told():
    setup = SimpleNamespace(spending=None, judge=None, config=Config())
    for parked in (3.0, 0):
        batch = Batch(counts=Counter(parked=parked))
        assert _extras(setup, batch, {}, {}) == ({"parked": parked} if parked else {})


def test_tokens_can_be_left_out_of_the_rollout_lines(miniature, tmp_path):
    turns = [t for e in run(miniature, tmp_path / "out", steps=1, no_log_tokens=True).rollouts[0] for t in e["turns"]]
    assert turns and not any("pieces" in turn for turn in turns)


def test_every_rollout_of_a_large_step_has_its_tokens_written(miniature, tmp_path, monkeypatch):
    """Per token they are most of a line: of 16,384 rollouts a step 164 MB, which nobody reads."""
    monkeypatch.setattr(output, "MOST_DETAILED", 9)
    (rollouts,) = run(miniature, tmp_path / "out", steps=1).rollouts
    size = len({e["sample"] for e in rollouts})
    detailed = [any("pieces" in turn for turn in e["turns"]) for e in rollouts]
    assert detailed == [e["group"] < 9 // size for e in rollouts] and 1 < sum(detailed) <= 9 < len(rollouts)
    assert all(e.keys() == documented("`rollouts/") for e in rollouts)


def test_metrics_and_rollout_lines_differ_in_turn_shapes_or_searches(first):
    for line, rollouts in zip(first.steps, first.rollouts, strict=True):
        counts = Counter()
        for rollout in rollouts:
            count_rollout(counts, rollout)
        told = {key: n for key, n in counts_of_step(line).items() if n}
        assert told == pytest.approx({key: n for key, n in counts.items() if n})


def test_report_that_fails_warns_once_and_ends_no_run(miniature, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(output, "write_report", lambda folder: 1 / 0)
    assert len(run(miniature, tmp_path / "out").steps) == 2
    assert capsys.readouterr().err.count("ZeroDivisionError") == 1


def test_interrupted_run_leaves_a_report_of_what_it_finished(miniature, tmp_path, monkeypatch):
    interrupting(monkeypatch, train, "roll_out", 2)
    with pytest.raises(SystemExit):
        train.main(arguments(miniature, tmp_path / "out", steps=5))
    assert '"step":[1]' in (tmp_path / "out" / "report.html").read_text()


def test_tracker_without_its_package_is_refused_before_anything_is_made(miniature, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    refused(capsys, miniature, tmp_path / "out", "pip install wandb", track="wandb")


def test_question_with_half_a_character_ends_no_run(tmp_path):
    """JSON has lone surrogates, UTF-8 has not."""
    out = output.Output(Config(out=str(tmp_path / "out")), SINGLE)
    out.begin(0)
    out.step(
        1,
        {"step": 1, "tool_failures": 0, "tool_calls": 0},
        [Episode(Example("e", b"", "why \ud800 ?", ("a",)), 0, 0)],
        None,
    )
    assert Run(tmp_path / "out").rollouts[0][0]["question"] == "why \ud800 ?"


def test_full_disk_is_one_line_and_no_half_file(tmp_path, monkeypatch):
    out = output.Output(Config(out=str(tmp_path / "out")), SINGLE)
    out.begin(0)

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    episode = Episode(Example("e", b"", "why ?", ("a",)), 0, 0)
    with pytest.raises(UserError, match="step-000001.jsonl: cannot be written .No space left"):
        out.step(1, {"step": 1, "tool_failures": 0, "tool_calls": 0}, [episode], None)
    assert not list((tmp_path / "out" / "rollouts").iterdir())
    with pytest.raises(UserError, match="metrics.jsonl: cannot be written"):
        out.line({"step": 0})
    with pytest.raises(UserError, match="config.json: cannot be written"):
        Config().save(tmp_path)


# ---- interruptions --------------------------------------------------------------------------------------------------


def interrupting(monkeypatch, owner, name, nth):
    calls, whole = [], getattr(owner, name)

    def once(self, *given, **more):
        calls.append(1)
        if len(calls) == nth:
            signal.raise_signal(signal.SIGINT)
        return whole(self, *given, **more)

    monkeypatch.setattr(owner, name, once)


def test_interrupt_keeps_what_was_learnt(miniature, tmp_path, monkeypatch):
    interrupting(monkeypatch, train, "roll_out", 3)
    with pytest.raises(SystemExit) as stop:
        train.main(arguments(miniature, tmp_path / "out", steps=5))
    found = Run(tmp_path / "out")
    assert stop.value.code == 130 and [line["step"] for line in found.lines] == [0, 1, 2] and len(found.rollouts) == 2
    assert not equal(found.weights, load_file(miniature / "model.safetensors"))
    load(tmp_path / "out" / "model")
    monkeypatch.undo()
    whole = run(miniature, tmp_path / "whole", lr_schedule="constant", eval_size=1)
    assert equal(found.weights, whole.weights), "the interrupted step must leave no trace"


def test_interrupt_before_the_first_step_is_no_traceback(miniature, tmp_path, monkeypatch, capfd):
    """The first evaluation of a large model takes minutes."""
    interrupting(monkeypatch, Engine, "step", 2)
    try:
        with pytest.raises(SystemExit) as stop:
            train.main(arguments(miniature, tmp_path / "out"))
    except KeyboardInterrupt:  # let through, it would end the whole test run
        pytest.fail("the KeyboardInterrupt came out of train.main")
    assert stop.value.code == 130
    err = capfd.readouterr().err
    assert err.count("SIGINT: stopping") == 1 and "metrics.jsonl" not in err and "WARNING" not in err, err


# ---- one run in a folder, made of what it was made of ---------------------------------------------------------------


def ended_with(capsys, argv) -> str:
    """The last line on standard error of a run that a user has to mend."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train.main(argv)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in err and err.endswith("\n"), err
    return err.rstrip("\n").split("\n")[-1]


def bytes_of(out: Path) -> dict[str, bytes]:
    return {str(file.relative_to(out)): file.read_bytes() for file in sorted(out.rglob("*")) if file.is_file()}


def test_second_run_in_a_folder_writes_into_the_files_of_the_first(first, miniature, tmp_path, capsys):
    out = Path(shutil.copytree(first.out, tmp_path / "out"))
    lock = Lock(out)
    before = bytes_of(out)
    for how in (dict(resume=True), {}, dict(resume=True, lr=0.5)):
        line = ended_with(capsys, arguments(miniature, out, **how))
        assert line.startswith(f"train.py: --out {out}: another run is at work in it (process {os.getpid()} on "), line
    assert write_report(out) == out / "report.html", "who reads is not hindered"
    lock.release()
    assert before | bytes_of(out) | {".lock": b""} == before | {
        ".lock": b"",
        "report.html": bytes_of(out)["report.html"],
    }


def test_second_run_in_an_empty_folder_overtakes_the_first_before_its_files_are_there(miniature, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    lock = Lock(tmp_path / "out")
    assert "another run is at work" in ended_with(capsys, arguments(miniature, tmp_path / "out"))
    assert [file.name for file in (tmp_path / "out").iterdir()] == [".lock"]
    lock.release()


def test_resumed_run_goes_on_with_other_data_base_model_or_prompts(miniature, tmp_path, capsys):
    base = Path(shutil.copytree(miniature, tmp_path / "base"))
    prompts = Path(shutil.copytree(PROMPTS / "toy", tmp_path / "prompts"))
    data, asked = questions(tmp_path / "data"), questions(tmp_path / "asked", 3)
    how = dict(data=data, eval_data=asked, prompts=prompts, search="none", resume=True, questions=2, mini_batch=2)
    out = run(base, tmp_path / "out", **how, steps=1).out
    before = bytes_of(out)
    picture, weights = tmp_path / "data" / "3.png", base / "model.safetensors"
    for file, changed, said in (
        (data, data.read_bytes().split(b"\n", 1)[1], "data.jsonl has changed (6 questions, now 5 questions)"),
        (picture, (tmp_path / "data" / "4.png").read_bytes(), "data.jsonl has changed since"),
        (asked, asked.read_bytes().replace(b"what", b"who"), "asked/data.jsonl has changed since"),
        (weights, weights.read_bytes()[:-1] + b"\x07", "base/model.safetensors has changed since"),
        (prompts / "user.txt", b"{question} now ?", "prompts/user.txt has changed since"),
    ):
        whole = file.read_bytes()
        file.write_bytes(changed)
        assert said in ended_with(capsys, arguments(base, out, **how, steps=1))
        file.write_bytes(whole)
    assert bytes_of(out) == before
    train.main(arguments(base, out, **how, steps=1))


@pytest.mark.first_is_quick
@pytest.mark.parametrize("gone", ["", "rollouts"])
def test_folder_removed_under_a_run_ends_in_a_traceback(miniature, tmp_path, monkeypatch, capsys, gone):
    out, roll_out = tmp_path / "out", train.roll_out

    def removed(step, *given):
        if step == 2:
            shutil.rmtree(out / gone)
        return roll_out(step, *given)

    monkeypatch.setattr(train, "roll_out", removed)
    if gone:  # somebody made room: nothing that the run needs
        assert len(run(miniature, out).rollouts) == 1
        return
    line = ended_with(capsys, arguments(miniature, out))
    assert line.startswith(f"train.py: --out {out}: removed, moved or replaced while this run was at work in it; ")
    assert not out.exists(), "half a run is made in its place"


def test_a_damaged_line_costs_all_metrics_behind_it(tmp_path):
    lines = [b'{"step": 0, "eval": {}}\n', b'{"step": 1}\n', b'{"ste\n', b"7\n", b'{"step": 2}\n']
    later = [b'{"step": 2, "eval": {}}\n', b'{"step": 3}\n', b'{"step": 2}\n']
    assert output._kept_bytes(lines + later, 2) == sum(map(len, lines))
    assert output._kept_bytes([*lines[:2], b'{"step": 2'], 2) == sum(map(len, lines[:2]))
    whole = json.dumps(dict.fromkeys(NEEDED, 0) | {"step": 3}).encode()
    (tmp_path / "metrics.jsonl").write_bytes(b"".join([*lines, whole]))
    resumed = SimpleNamespace(ranks=SINGLE, metrics=tmp_path / "metrics.jsonl")
    assert [line["step"] for line in output.Output.steps(resumed)] == [3]
    assert [output._record(line) for line in (b"[1]", b'{"step": "2"}', b"[" * 99999, b'{"step": 2}')] == [None] * 3 + [
        {"step": 2}
    ]


# ---- bad input ------------------------------------------------------------------------------------------------------


def test_out_folder_that_is_not_empty_is_refused(capsys, miniature, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("mine")
    with pytest.raises(SystemExit) as stop:
        train.main(arguments(miniature, tmp_path / "out"))
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and "not empty" in err
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["precious.txt"]
    with pytest.raises(SystemExit) as stop:
        train.main(arguments(miniature, tmp_path / "out" / "precious.txt"))
    assert stop.value.code == 2 and (tmp_path / "out" / "precious.txt").read_text() == "mine"


def test_out_folder_is_looked_at_before_minutes_of_work(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(toy_base, "_warm_start", lambda *given: pytest.fail("warm start before --out was checked"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("mine")
    with pytest.raises(SystemExit) as stop:
        train.main(["--out", str(tmp_path / "out")])
    assert stop.value.code == 2


def test_out_folder_that_is_empty_is_used(miniature, tmp_path):
    (tmp_path / "out").mkdir()
    assert run(miniature, tmp_path / "out", steps=1).steps


def test_out_folder_below_a_file_is_refused(capsys, miniature, tmp_path):
    (tmp_path / "file").write_text("")
    refused(capsys, miniature, tmp_path / "file" / "out", "file")


@pytest.fixture
def spoilt(miniature, tmp_path):
    """A copy of the base model to spoil."""
    return Path(shutil.copytree(miniature, tmp_path / "spoilt"))


def test_model_folder_without_weights(capsys, spoilt, tmp_path):
    (spoilt / "model.safetensors").unlink()
    refused(capsys, spoilt, tmp_path / "out", "model.safetensors")


def test_model_folder_that_is_not_there(capsys, tmp_path):
    refused(capsys, tmp_path / "nowhere", tmp_path / "out", "nowhere")


def test_model_of_another_architecture(capsys, spoilt, tmp_path):
    edit_json(spoilt / "config.json", model_type="llama", architectures=["LlamaForCausalLM"])
    refused(capsys, spoilt, tmp_path / "out", "Qwen2.5-VL")


def test_model_with_missing_tensors(capsys, spoilt, tmp_path):
    weights = load_file(spoilt / "model.safetensors")
    name = next(name for name in weights if "layers.1" in name)
    save_file({key: value for key, value in weights.items() if key != name}, spoilt / "model.safetensors")
    refused(capsys, spoilt, tmp_path / "out", name)


def test_model_cut_short(capsys, spoilt, tmp_path):
    whole = (spoilt / "model.safetensors").read_bytes()
    (spoilt / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    refused(capsys, spoilt, tmp_path / "out", "model.safetensors")


def test_model_with_weights_that_are_no_numbers(capsys, spoilt, tmp_path):
    weights = load_file(spoilt / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, spoilt / "model.safetensors")
    refused(capsys, spoilt, tmp_path / "out", "model.norm.weight holds NaN")


def test_model_that_is_an_adapter(capsys, tmp_path):
    """As they are saved: with neither config.json nor tokenizer."""
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "Qwen/Qwen2.5-VL-7B-Instruct"}')
    said = "an adapter of Qwen/Qwen2.5-VL-7B-Instruct, not a model: give it as --adapter DIR, with its base as --model"
    refused(capsys, tmp_path, tmp_path / "out", said)


def test_adapter_of_another_base_or_none(capsys, miniature, spoilt, tmp_path):
    adapter = random_adapter(tmp_path / "run" / "adapter", miniature, "q_proj")
    for given, said in (
        (tmp_path / "run", f"no adapter's folder, but {adapter} is: give that"),
        (miniature, "holds a whole model, no adapter: give it as --model, without --adapter"),
        (tmp_path / "none", "--adapter {}: there is no such folder; give one, or a hub id".format(tmp_path / "none")),
    ):
        refused(capsys, miniature, tmp_path / "out", said, adapter=given)
    weights = load_file(spoilt / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"] += 1e-6
    save_file(weights, spoilt / "model.safetensors")
    said = f"its base is {miniature}, and {spoilt} has other weights: give {miniature} as --model"
    refused(capsys, spoilt, tmp_path / "out", said, adapter=adapter)
    save(tiny_model(), tmp_path / "tiny")
    other = random_adapter(tmp_path / "other", tmp_path / "tiny")
    said = f"it belongs to another model: give its base, {tmp_path / 'tiny'}"
    refused(capsys, miniature, tmp_path / "out", said, adapter=other)
    edit_json(adapter / "adapter_config.json", use_dora=True)
    refused(capsys, miniature, tmp_path / "out", "use_dora makes it DoRA, and only plain LoRA", adapter=adapter)


def test_run_with_adapter_loses_its_base_or_goes_on_with_another_adapter(capsys, miniature, tmp_path):
    adapter = random_adapter(tmp_path / "first", miniature, "q_proj", "vision.qkv", base_named="someone/base")
    weights = adapter / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file(tensors, weights)  # as PEFT writes it: without a digest of the base
    edit_json(adapter / "adapter_config.json", lora_dropout=0.1)
    small = dict(questions=2, mini_batch=2, steps=1, resume=True, adapter=adapter, save_every=1)
    out = tmp_path / "out"
    train.main(arguments(miniature, out, **small))
    said = capsys.readouterr().out
    assert f"it names someone/base as its base; whether {miniature} has the same weights cannot be checked.\n" in said
    assert "has lora_dropout 0.1: nothing is dropped here.\n" in said
    written = read_adapter(out / "adapter", linear_layers(skeleton(miniature)))
    assert written.settings.base == str(miniature) and written.digest == base_digest(miniature)
    assert len(written.layers) == len(tensors) / 2 and not (out / "model").exists()
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, weights)
    said = ended_with(capsys, arguments(miniature, out, **small))
    assert f"--adapter {adapter}/adapter_model.safetensors has changed since the run in it began" in said
    train.open_setup(parse(arguments(miniature, tmp_path / "second", **small | {"adapter": out / "adapter"})))
    assert "cannot be checked" not in capsys.readouterr().out, "its own adapter knows its base"


def test_head_that_is_not_the_embedding_is_dropped_for_a_flag(capsys, spoilt, tmp_path):
    weights = load_file(spoilt / "model.safetensors")
    head = weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1
    save_file(weights, spoilt / "model.safetensors")
    setup = train.open_setup(parse(arguments(spoilt, tmp_path / "out")))
    assert equal({"": setup.model.head_weight}, {"": head}) and not setup.model.config.tie_word_embeddings
    assert "config.json ties the head to the embedding, but another head is stored" in capsys.readouterr().out


def test_model_without_tokenizer(capsys, spoilt, tmp_path):
    (spoilt / "tokenizer.json").unlink()
    refused(capsys, spoilt, tmp_path / "out", "tokenizer.json")


def test_tokenizer_of_another_model(capsys, spoilt, tmp_path):
    """A vocabulary larger than the model's."""
    tokens = json.loads((spoilt / "tokenizer.json").read_text())["added_tokens"]
    edit_json(spoilt / "tokenizer.json", added_tokens=[{**token, "id": token["id"] + 100} for token in tokens])
    refused(capsys, spoilt, tmp_path / "out", "vocabulary")


def test_tokenizer_of_another_order(capsys, spoilt, tmp_path):
    """Its placeholder of pictures is another token of the model's."""
    ids = json.loads((spoilt / "config.json").read_text())
    swapped = {"image_token_id": ids["vision_end_token_id"], "vision_end_token_id": ids["image_token_id"]}
    edit_json(spoilt / "config.json", **swapped)
    refused(capsys, spoilt, tmp_path / "out", "in tokenizer.json and")


def questions(folder: Path, n: int = 6, **changes) -> Path:
    """A small JSONL data set with its pictures; `changes` of the last row, None removes a key."""
    folder.mkdir()
    lines = []
    for i in range(n):
        (folder / f"{i}.png").write_bytes(picture_bytes(56, 56, seed=i))
        line = {
            "id": f"row{i}",
            "image": f"{i}.png",
            "question": "what is this ?",
            "answers": ["a"],
            "category": "made",
        }
        lines.append(
            {key: value for key, value in (line | changes if i == n - 1 else line).items() if value is not None}
        )
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "data.jsonl"


def test_prompts_that_do_not_fit_train_nothing_in_silence(capsys, miniature, tmp_path):
    data = questions(tmp_path / "data", question="what is this ? " * 90)
    argv = arguments(miniature, tmp_path / "out", data=data, search="none", eval_size=9, device="cpu")
    with pytest.MonkeyPatch.context() as patch:  # no model is needed to know
        patch.setattr(policy, "load_model", lambda *given: pytest.fail("prompts are measured too late"))
        with pytest.raises(pytest.fail.Exception):
            train.main(argv)
    err = capsys.readouterr().err.splitlines()
    one = "1 of 6 prompts do not fit --max-tokens 128 with a picture and an answer of 3 tokens"
    for option, line in zip(("--data", "--eval-data"), err, strict=True):
        assert line.startswith(f"WARNING: {option} {data}: {one}: they cannot be answered and count as wrong (row5)")
    none = "no prompt can fit --max-tokens 12 with a picture and an answer of 3 tokens; the shortest takes 20; raise"
    refused(capsys, miniature, tmp_path / "out", none, max_tokens=12)
    refused(capsys, miniature, tmp_path / "out", "--turn-tokens 2: the shortest answer takes 3", turn_tokens=2)


def test_data_file_of_ones_own(miniature, tmp_path):
    found = run(miniature, tmp_path / "out", data=questions(tmp_path / "data"), search="none", steps=1)
    assert list(found.evaluations[0]["eval"]) == ["made"] and "always_search" not in found.evaluations[0]


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"answers": None}, "row 5, column answers"),
        ({"question": "  "}, "row 5, column question"),
        ({"id": None}, "row 5, column id"),
        ({"answers": "a"}, "row 5, column answers"),
    ],
)
def test_data_with_a_spoilt_row(capsys, miniature, tmp_path, changes, said):
    data = questions(tmp_path / "data", **changes)
    refused(capsys, miniature, tmp_path / "out", said, data=data, search="none")


def test_parquet_with_other_columns(capsys, miniature, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": ["a"], "label": [1]}), tmp_path / "other.parquet")
    said = "--columns question=text,answers=label,image=…"
    refused(capsys, miniature, tmp_path / "out", said, data=tmp_path / "other.parquet", search="none")


def test_broken_picture_among_the_first_rows_is_seen_before_the_run(capsys, miniature, tmp_path):
    data = questions(tmp_path / "data")
    (tmp_path / "data" / "1.png").write_bytes(b"no picture")
    refused(capsys, miniature, tmp_path / "out", "row 1, column image", data=data, search="none")


def test_broken_picture_met_later_ends_the_run_with_one_line(capsys, miniature, tmp_path):
    """Pictures are checked when used: the run has begun, but nothing else may change."""
    data = questions(tmp_path / "data")
    (tmp_path / "data" / "5.png").write_bytes(b"no picture")
    with pytest.raises(SystemExit) as stop:
        train.main(arguments(miniature, tmp_path / "out", data=data, search="none", questions=6, mini_batch=6))
    err = capsys.readouterr().err
    last = err.rstrip("\n").split("\n")[-1]
    assert stop.value.code == 2 and "Traceback" not in err and "row 5, column image" in last
    assert last.startswith("train.py: "), "the line must not hang on a progress bar"


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(colour="red"), "--colour"),
        (dict(lr="fast"), "fast"),
        (dict(group_size=1), "--group-size 1"),
        (dict(mini_batch=3), "--mini-batch 3"),
        (dict(search="telepathy"), "telepathy"),
        (dict(search="replay:"), "replay:"),
        (dict(search="replay:/nowhere.jsonl"), "/nowhere.jsonl"),
        (dict(data="nowhere.jsonl"), "nowhere.jsonl"),
        (dict(data="file.csv"), "file.csv"),
        (dict(eval_data="nowhere.jsonl"), "nowhere.jsonl"),
        (dict(prompts="/no/such/folder"), "/no/such/folder"),
        (dict(device="warp"), "--device warp"),
        (dict(toy="flat"), "flat"),
    ],
)
def test_wrong_option_is_one_line(capsys, miniature, tmp_path, changes, said):
    refused(capsys, miniature, tmp_path / "out", said, **changes)


def test_empty_data_set_is_refused_before_the_run(capsys, miniature, tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    refused(capsys, miniature, tmp_path / "out", "empty", data=tmp_path / "empty.jsonl", search="none")


def test_prompts_folder_of_ones_own(miniature, tmp_path):
    shutil.copytree(PROMPTS / "toy", tmp_path / "prompts")
    (tmp_path / "prompts" / "user.txt").write_text("{question} search or no search ?")
    assert run(miniature, tmp_path / "out", prompts=tmp_path / "prompts", steps=1).steps


# ---- toy worlds ----------------------------------------------------------------------------------------------------

TOWNS = ("familiar_fact", "known_new_fact", "unfamiliar_fact", "unknown_two_hop")  # categories that ask for a town
FULL = {"familiar", "unfamiliar", "held_out", *TOWNS}


def test_full_world_is_evaluated_by_its_categories_with_all_searches_and_with_none(miniature, tmp_path, capsys):
    found = run(miniature, tmp_path / "out", toy="full", steps=1)
    for line in found.evaluations:
        assert set(line["eval"]) == set(line["eval_sampled"]) == FULL
    before = found.evaluations[0]
    for name in FULL:
        always, never = before["always_search"][name], before["never_search"][name]
        assert always["search_ratio_image"] == 1 and always["search_ratio_text"] == (name in TOWNS)
        assert never["search_ratio"] == 0
    *said, table, fixed, end = capsys.readouterr().out.split("\n\n")
    assert all(name in table and name in fixed for name in FULL)
    lines = [*table.splitlines(), *fixed.splitlines()]
    assert max(map(len, lines)) <= 80, "the table is wider than a terminal"
    assert f"eval.py --model {found.out / 'model'} --data toy" in end and "open it in a browser" in end
    lasting = "".join(said).splitlines()
    assert [line.split("  ")[0] for line in lasting if line[:5] in ("step ", "eval ")] == (
        4 * ["eval 0/1"] + ["step 1/1"] + 2 * ["eval 1/1"]
    )


def test_text_searches_are_not_forced_where_there_are_none(miniature, tmp_path):
    found = run(miniature, tmp_path / "out", toy="full", steps=1, max_texts=0)
    always = found.evaluations[0]["always_search"]["unknown_two_hop"]
    assert (always["search_ratio_image"], always["search_ratio_text"]) == (1, 0)


@pytest.mark.slow
def test_world_of_ones_own_is_trained_in(miniature, tmp_path, capsys):
    """Thumbnails go from the web through the rollout into the update. eval.py could not make that world again."""
    world = toy.World(0, dataclasses.replace(toy.FULL, thumbnails=True))
    train.train(parse(arguments(miniature, tmp_path / "out", toy="full", steps=1)), SINGLE, world)
    found = Run(tmp_path / "out")
    (step,) = found.steps
    seen = [turn["observation"] for record in found.rollouts[0] for turn in record["turns"] if turn["role"] == "tool"]
    shown = [observation["images"] for observation in seen if observation["source"] == "toy" and observation["titles"]]
    assert shown and set(shown) <= {0, 3} and 3 in shown
    assert step["images"]["distinct"] > 4
    assert "Written in" in (said := capsys.readouterr().out) and "Next:" not in said


@pytest.mark.slow
def test_full_world_from_warm_start_to_table(tmp_path, monkeypatch, capsys):
    """All of `python train.py --toy full`, with a warm start that is far too short."""
    recipe = toy_base.WarmStart(steps=60, batch=32, lr=3e-3, warmup=10, copying=0.0, names=0.0, towns=0.0)
    monkeypatch.setenv("MMSR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(toy_base, "base_model", partial(toy_base.base_model, recipe=recipe))
    smaller = "--steps 3 --eval-size 5 --questions 12 --mini-batch 12".split()
    train.main(["--toy", "full", *smaller, "--out", str(tmp_path / "out")])
    found = Run(tmp_path / "out")
    assert len(found.steps) == 3 and all(line["search_ratio_image"] > 0 for line in found.steps)
    assert set(found.evaluations[-1]["eval"]) == FULL
    records = [record for step in found.rollouts for record in step]
    shapes = {tuple(turn["action"] for turn in r["turns"] if turn["role"] == "assistant") for r in records}
    assert ("image_search", "text_search", "answer") in shapes and ("text_search", "answer") in shapes
    said = capsys.readouterr().out
    assert "unknown_two_hop" in said and "Next: python eval.py" in said


# ---- for real -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_it_learns_to_search_for_what_it_does_not_know_and_for_nothing_else(basic_base, tmp_path):
    """The paper's headline in the toy world."""
    found = run(basic_base, tmp_path / "out", steps=25, questions=32, mini_batch=32, group_size=8, eval_size=100)
    before, after = found.evaluations[0], found.evaluations[-1]
    greedy = {category: row["search_ratio"] for category, row in after["eval"].items()}
    print(greedy)
    assert greedy["familiar"] <= 0.25 and greedy["unfamiliar"] >= 0.85 and greedy["held_out"] >= 0.85

    def accuracy(line):
        return sum(toy.BASIC.mix[category] * row["accuracy"] for category, row in line["eval_sampled"].items())

    assert accuracy(after) >= accuracy(before) + 0.15
    assert all(line["tokens"]["prefilled"] <= 1.05 * line["tokens"]["prefilled_unique"] for line in found.steps)
    assert all(line["logp_gap_max"] <= 1e-4 for line in found.steps)
