"""Benchmarks that no GPU or peer is there for must still run when one is."""

import ast
import importlib
import json
import subprocess
import sys
import types
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import train
from mmsr.config import Config, parse
from mmsr.system.parallel import SINGLE
from mmsr.toy.world import BASIC, FULL, LOOK_IT_UP, World
from mmsr.update import Trainer

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "bench"))

import claims  # noqa: E402
import gpu_day  # noqa: E402
import gpu_rows  # noqa: E402
import losses  # noqa: E402
import replay_released  # noqa: E402
import step_time  # noqa: E402
import toy_runs  # noqa: E402
import what_breaks  # noqa: E402


def output(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("file", sorted((ROOT / "bench").glob("*.py")), ids=lambda file: file.stem)
def test_a_benchmark_imports_what_has_another_name_now(file):
    """Also one that needs packages which are not here, as against_trl.py does."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in ("mmsr", "train"):
            module = importlib.import_module(node.module)
            for name in node.names:
                assert hasattr(module, name.name) or find_spec(f"{node.module}.{name.name}"), name.name


def test_generation_benchmark_compares_unequal_tokens():
    found = output("bench/generation.py", "--batches", "3x1,2x4", "--new-tokens", "12", "--side", "56")
    assert "3 of 3" in found and "8 of 8" in found


@pytest.mark.slow
def test_latency_benchmark_no_longer_runs():
    sizes = ["--questions", "2", "--group", "2", "--slots", "4", "--turn-tokens", "8", "--latency", "0.01"]
    assert "| ratio |" in output("bench/latency.py", *sizes)


# ---- the day with a GPU


@pytest.mark.slow
def test_a_row_that_needs_a_gpu_no_longer_runs(tmp_path):
    """The program itself; all rows of part 2 run in the test of what only a GPU reaches."""
    arguments = ("bench/gpu_day.py", "--device", "cpu", "--tiny", "--no-equalities", "--out", str(tmp_path))
    told = output(*arguments, "--part", "1")
    (kept,) = tmp_path.glob("*.json")
    rows = json.loads(kept.read_text())["parts"]["1"]["rows"]
    assert len(rows) == len(gpu_day.PARTS[1]) and all(row["figures"] for row in rows)
    assert told.endswith(kept.with_suffix(".md").read_text() + "\n")


CHILD = """
import json, os, sys, time

print(json.dumps({"ready": "now"}), flush=True)
for line in sys.stdin:
    row = json.loads(line)
    if row["work"] == "hang":
        time.sleep(100)
    if row["work"] == "die":
        os.kill(os.getpid(), 11)
    failed = row["work"] == "fail"
    figures = [] if failed else [{"value": os.getpid(), "unit": "TB/s"}]
    reason = "failed: RuntimeError: no" if failed else None
    print(json.dumps({"figures": figures, "reason": reason, "over": row["work"] == "last"}), flush=True)
"""


def measured(tmp_path, works, clock=None, command=(sys.executable, "-c", CHILD), limit=60.0):
    rows = [gpu_day.Row(f"{number} {work}", work, 0.5, limit) for number, work in enumerate(works)]
    clock = clock or gpu_day.Clock(60)
    return [found for _, found in gpu_day.measure(rows, command, clock, tmp_path / "log")]


@pytest.mark.slow
def test_a_row_that_fails_hangs_or_kills_its_process_takes_another_with_it(tmp_path):
    works = ["good", "fail", "good", "hang", "good", "die", "good", "last", "good"]
    found = measured(tmp_path, works, limit=2.0)
    assert [row["reason"] for row in found] == [
        *(None, "failed: RuntimeError: no", None, "killed after 2 s", None, "its process ended: SIGSEGV"),
        *(None, None, None),
    ]
    children = [row["figures"][0]["value"] for row in found if row["figures"]]
    assert children[0] == children[1] and len({*children}) == 4 and children[3] == children[4]


@pytest.mark.slow
def test_a_part_takes_longer_than_its_clock(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_day, "START", 0.5)
    clock = gpu_day.Clock(5)
    found = measured(tmp_path, ["good", "hang", "good"], clock)
    assert clock.spent < 5 + 4  # seconds that ending a child may take
    assert [bool(row["figures"]) for row in found] == [True, False, False]
    assert found[1]["reason"].startswith("killed after") and found[2]["reason"] == "0 s left, 1 s needed"


def test_each_row_tries_to_start_a_process_that_does_not_start(tmp_path):
    program = "import sys; print('begun', file=sys.stderr); import nothing_of_this_name"
    found = measured(tmp_path, ["good"] * 4, command=(sys.executable, "-c", program))
    reasons = [row["reason"] for row in found]
    assert reasons[:2] == ["its process did not start: exit status 1"] * 2
    assert reasons[2:] == ["twice a process for the rows did not start: see the log"] * 2
    assert (tmp_path / "log").read_text().count("begun") == 2


def test_a_row_is_not_told_what_the_machine_can_do():
    told = {"figures": [{"value": 4.3, "unit": "TB/s"}]}
    assert gpu_day.limits_in(gpu_day.LIMITS[0], told) == {"bandwidth": pytest.approx(4.3e12)}
    assert gpu_day.limits_in(gpu_day.LIMITS[0], gpu_day.missed("hung")) == {}


ABOUT = {"commit": "abc", "card": "NVIDIA H200"}


def a_row(name, value=None):
    figures = [] if value is None else [{"value": value, "unit": "s", "predicted": 2.0, "share": 0.5}]
    return {"row": name, "figures": figures, "reason": None if figures else "hung | up", "seconds": 1.0}


def test_what_is_on_the_disk_after_a_row_is_not_whole(tmp_path):
    record = gpu_day.Record(tmp_path / "out", ABOUT)
    for number in range(3):
        record.add(1, a_row(f"row {number}", 1.5 if number else None), 10.0)
        kept = json.loads(record.json.read_text())["parts"]["1"]["rows"]
        table = record.markdown.read_text()
        assert len(kept) == number + 1 and all(f"| row {n} |" in table for n in range(number + 1))
    assert (
        "| row 0 | not measured |  |  | hung ¦ up | 1 |" in table and "| row 2 | 1.5 s | 2.0 s | 50% |  | 1 |" in table
    )
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"abc-NVIDIA-H200.json", "abc-NVIDIA-H200.md"}


def test_part_2_loses_something_of_part_1(tmp_path):
    gpu_day.Record(tmp_path, ABOUT).add(1, a_row("copy bandwidth", 1.0), 10.0)
    second = gpu_day.Record(tmp_path, ABOUT)
    second.add(2, a_row("copy bandwidth", 2.0), 20.0)
    second.add(1, a_row("copy bandwidth"), 5.0)  # tried again in vain
    parts = json.loads(second.json.read_text())["parts"]
    assert parts["1"]["rows"] == [a_row("copy bandwidth", 1.0)] and parts["2"]["rows"] == [a_row("copy bandwidth", 2.0)]
    for other in (ABOUT | {"card": "NVIDIA H100"}, ABOUT | {"commit": "abc-dirty"}):
        assert gpu_day.Record(tmp_path, other).value["parts"] == {}
    second.json.write_text("{")
    assert gpu_day.Record(tmp_path, ABOUT).value["parts"] == {}


PYTEST = """
tests/test_devices.py::test_logits[cuda] PASSED                          [ 25%]
tests/test_attention.py::test_a_kernel[2-2-True-equal lengths-varlen] FAILED [ 50%]
tests/test_attention.py::test_a_kernel[2-2-True-equal lengths-flash] SKIPPED (flash is not installed) [ 75%]
"""


def test_equalities_that_fail_or_hang_are_not_named():
    (found,) = gpu_day.tests_in(PYTEST, "")["figures"]
    named = "test_a_kernel[2-2-True-equal lengths-varlen] failed"
    assert found == {"value": 1, "unit": "passed", "remark": f"1 failed, 1 skipped; {named}"}
    (found,) = gpu_day.tests_in(PYTEST + "tests/test_devices.py::test_graph[cuda] ", "killed after 90 s")["figures"]
    assert found["remark"] == f"1 failed, 1 skipped; {named}; killed after 90 s in test_graph[cuda]"
    assert gpu_day.tests_in("No module named pytest", "") == gpu_day.missed("no test ran: see the log")


@pytest.mark.slow
def test_pytest_speaks_otherwise_or_is_not_stopped(tmp_path):
    file = tmp_path / "test_here.py"
    file.write_text(
        "import time\ndef test_good():\n    print('largest difference, a gap: 1.5e-03')\n"
        "def test_bad():\n    assert 1 == 2\ndef test_slow():\n    time.sleep(100)\n"
    )
    count, gap = gpu_day.equalities(str(file), ["-k", "good or bad"], 60, tmp_path / "log")["figures"]
    assert count == {"value": 1, "unit": "passed", "remark": "1 failed; test_bad failed"}
    assert gap == {"value": 1.5e-3, "unit": "", "what": "a gap"}
    count, *_ = gpu_day.equalities(str(file), [], 12, tmp_path / "log")["figures"]
    assert count["value"] == 1 and count["remark"].endswith("killed after 12 s in test_slow")
    assert gpu_day.equalities(str(file), ["-k", "nothing"], 60, tmp_path / "log")["reason"]


@pytest.mark.slow
def test_a_line_that_only_a_gpu_reaches_is_broken(monkeypatch):
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    for name in ("memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: 1000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: types.SimpleNamespace(total_memory=2**33))
    bench = gpu_rows.Bench(torch.device("cpu"), gpu_rows.Sizes.tiny(), torch.bfloat16, gpu_rows.tiny_shapes())
    bench.cuda = True
    monkeypatch.setattr(gpu_rows, "WARM", 4)
    limits = {"bandwidth": 1e12, "matrix": 1e14}
    for row in [*gpu_day.PARTS[1], *gpu_day.PARTS[2]]:
        told = bench.answer({"row": row.name, "work": row.work, "options": row.options, "limits": limits})
        assert told["figures"] and not told["over"], told
        assert all(figure["value"] is not None for figure in told["figures"])
        assert list(gpu_day.cells_of({"row": row.name, "seconds": 1.0, **told}))


def test_graphs_are_miscounted(monkeypatch):
    for name in ("capture_begin", "capture_end", "replay"):
        monkeypatch.setattr(torch.cuda.CUDAGraph, name, lambda self, *args: None)
    with gpu_rows.counting_graphs() as seen:
        graph = types.SimpleNamespace()
        torch.cuda.CUDAGraph.capture_begin(graph, "pool")
        torch.cuda.CUDAGraph.capture_begin(graph)
        torch.cuda.CUDAGraph.capture_end(graph)
        torch.cuda.CUDAGraph.replay(graph)
    torch.cuda.CUDAGraph.replay(graph)
    assert seen == {"begun": 2, "captured": 1, "replayed": 1}


@pytest.mark.slow
def test_a_card_that_is_too_small_is_tried(monkeypatch):
    bench = gpu_rows.Bench(torch.device("cpu"), gpu_rows.Sizes(), torch.bfloat16, gpu_rows.SHAPES)
    monkeypatch.setattr(gpu_rows.Bench, "usable", 72 * gpu_rows.GIB)
    for work, options in [("train", dict(recompute=True)), ("train", dict(recompute=False)), ("step", {})]:
        row = {"row": work, "work": work, "options": dict(shape="7B") | options, "limits": {}}
        assert "72 are usable here" in bench.answer(row)["reason"]
    assert "takes 77 GiB" in bench.answer({"work": "memory", "options": dict(shape="7B"), "limits": {}})["reason"]
    assert bench.micro_tokens("7B", 4, True, optimizer=False) == bench.micro_tokens("3B", 32, True) == 16384


@pytest.mark.first_is_quick
@pytest.mark.parametrize("shape", ["3B", "Q3-2B"])
@pytest.mark.parametrize(
    "work, options", [("decode", dict(sequences=2, capture=False)), ("train", dict(recompute=True))]
)
def test_a_prediction_is_missing_or_costs_a_figure(work, options, shape, monkeypatch):
    """The roofline's, at the rates that were measured; where it fails the figure is there all the same."""
    bench = gpu_rows.Bench(torch.device("cpu"), gpu_rows.Sizes.tiny(), torch.bfloat16, gpu_rows.tiny_shapes())
    row = {
        "row": work,
        "work": work,
        "options": dict(shape=shape) | options,
        "limits": dict(bandwidth=3e12, matrix=7e14),
    }
    (figure,) = bench.answer(row)["figures"]
    assert figure["unit"] == "tok/s" and figure["value"] > 0 and figure["predicted"] > 0
    monkeypatch.setitem(sys.modules, "roofline", types.SimpleNamespace())
    (figure,) = bench.answer(row)["figures"]
    assert figure["value"] > 0 and figure["predicted"] is None
    (figure,) = bench.answer({"row": "", "work": "matrix", "options": {}, "limits": row["limits"]})["figures"]
    assert figure["predicted"] is None


# ---- seconds of a step


def test_a_step_by_lora_sends_gradients_of_frozen_weights():
    """Whole on every device, weights do not travel at all; sharded, they are gathered, and have no gradients."""
    full, by_lora = step_time.recipe("paper"), step_time.recipe("paper", lora=64)
    weights, numbers = (step_time.sizes(step_time.SIZES["Qwen2.5-VL-7B"]).count(), 161_480_704)
    assert step_time.trained(step_time.SIZES["Qwen2.5-VL-7B"], by_lora).numbers() == numbers
    updates = full.questions // full.mini_batch
    summed = updates * 2 * 4 * numbers * 7 / 8  # bytes: an all-reduce of fp32 numbers for each update
    whole = step_time.step("Qwen2.5-VL-7B", by_lora, 8)
    assert (whole.inside, whole.between) == (pytest.approx(summed), 0)
    sharded = step_time.step("Qwen2.5-VL-7B", replace(by_lora, shard="node"), 8)
    gathers = sharded.micro_batches * (2 + 2) + 1  # forward and backward, reference, π_old, and once to generate
    assert sharded.inside == pytest.approx(summed + gathers * 2 * weights * 7 / 8)
    before = step_time.step("Qwen2.5-VL-7B", full, 8)
    assert before.inside == pytest.approx((before.micro_batches * (2 + 2 + 2) + 1) * 2 * weights * 7 / 8)
    assert step_time.step("Qwen2.5-VL-7B", by_lora, 1).traffic == 0


@pytest.mark.parametrize("model", step_time.MODELS)
@pytest.mark.parametrize("name", ["blog", "paper"])  # steps of `released` are mostly decoding
def test_lora_on_eight_devices_is_slower_than_full_training(model, name):
    full, by_lora = (step_time.step(model, step_time.recipe(name, lora=rank), 8) for rank in (0, 64))
    assert by_lora.seconds < full.seconds


def test_the_table_of_lora_is_not_what_its_command_prints():
    assert step_time.lora_table() in (ROOT / "docs/performance.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_shares_of_lora_are_not_those_of_the_roofline():
    found = step_time.roofline_shares(step_time.LORA, ["7B"])
    assert found == {name: shares for name, shares in step_time.LORA_SHARES.items() if name[1].endswith("7B")}


# ---- claims


def evaluation(**changes):
    """Every category alike, but for `changes`: a category's numbers."""
    usual = dict(accuracy=0.9, reward=0.85, search_ratio=0.5, search_ratio_image=0.4, search_ratio_text=0.2)
    return {category: usual | changes.get(category, changes.get("every", {})) for category in FULL.mix}


def outcome(forced=None, sampled=None, **changes):
    found = evaluation(**changes)
    return {"after": {"eval": found, "eval_sampled": sampled or found}, "forced": forced or {}, "shapes": []}


def everywhere(**numbers):
    return outcome(every=numbers)


def test_familiarity_that_is_not_followed_counts_as_followed():
    def curve(rates):
        found = {f"exposure_{n}": {"search_ratio_image": rate} for n, rate in zip(claims.EXPOSURES, rates)}
        return {"graded": outcome(sampled=found)}

    rising = [0.0, 0.0, 0.05, 0.02, 0.3, 0.9, 1.0, 0.97, 1.0]
    assert claims.a(curve(rising))[1]
    assert not claims.a(curve(rising[::-1]))[1]
    assert not claims.a(curve([rate / 2 for rate in rising]))[1]  # in order, but never sure
    assert not claims.a(curve([0.5] * 9))[1]


def test_rank_correlation_is_not_spearmans():
    assert claims.rank_correlation([1, 2, 3], [1, 100, 101]) == pytest.approx(1)
    assert claims.rank_correlation([1, 2, 3, 4], [1, 3, 3, 2]) == pytest.approx(1.5 / 22.5**0.5)
    assert claims.rank_correlation([1, 2], [5, 5]) == 0


@pytest.mark.parametrize("worse", [dict(accuracy=0.95), dict(reward=0.95)])
def test_sft_that_is_better_in_one_thing_counts_as_beaten(worse):
    grpo = everywhere(accuracy=0.9, reward=0.9)
    assert claims.b({"full": grpo, "sft-2n": everywhere(accuracy=0.8, reward=0.8)})[1]
    assert not claims.b({"full": grpo, "sft-2n": everywhere(**dict(accuracy=0.8, reward=0.8) | worse)})[1]


@pytest.mark.parametrize(
    "always, calls, never, holds",
    [(0.9, 1.0, 0.5, True), (0.91, 1.0, 0.5, False), (0.9, 0.8, 0.5, False), (0.9, 1.0, 0.9, False)],
)
def test_each_part_of_searching_on_demand_is_not_asked_for(always, calls, never, holds):
    forced = {
        "always, before": evaluation(every=dict(accuracy=0.1, search_ratio_image=1.0, search_ratio_text=0.5)),
        "always, after": evaluation(every=dict(accuracy=always, search_ratio_image=calls, search_ratio_text=0.0)),
        "never, before": evaluation(every=dict(accuracy=never)),
    }  # fmt: skip
    run = outcome(forced)
    assert claims.c({"full": run, "wrong-30": run})[1] == holds


@pytest.mark.parametrize("claim, run", [(claims.d, "no-penalty"), (claims.e, "no-search-free")])
def test_a_ratio_of_one_that_the_sound_run_has_too_counts(claim, run):
    much, little = everywhere(search_ratio=0.99), everywhere(search_ratio=0.6)
    assert claim({run: much, "full": little})[1]
    assert not claim({run: little, "full": little})[1]
    assert not claim({run: much, "full": much})[1]


def test_a_memory_that_is_worse_is_compared_with_a_run_of_the_usual_world():
    memory = {"before": {"never_search": evaluation(every=dict(accuracy=0.75))}}
    much, little = everywhere(search_ratio=0.99) | memory, everywhere(search_ratio=0.6) | memory
    found, holds = claims.d2({"unsure-no-penalty": much, "unsure": little})
    assert holds and found["memory right, before"] == pytest.approx(0.75)
    assert not claims.d2({"unsure-no-penalty": much, "unsure": much})[1]
    sure = {"before": {"never_search": evaluation(every=dict(accuracy=0.95))}}
    assert not claims.d2({"unsure-no-penalty": much, "unsure": little | sure})[1]


def test_reading_that_gets_better_only_in_sampling_counts():
    def naive(after, sampled):
        forced = {
            "always, before": evaluation(every=dict(accuracy=0.6)),
            "always, after": evaluation(every=dict(accuracy=after)),
            "always, after, T = 1": evaluation(every=dict(accuracy=sampled)),
        }
        return {"naive": outcome(forced) | {"before": {"always_search": evaluation(every=dict(accuracy=0.5))}}}

    assert claims.f(naive(0.7, 0.7))[1]
    assert not claims.f(naive(0.6, 0.7))[1] and not claims.f(naive(0.7, 0.5))[1]


def test_rewards_that_lead_elsewhere_count_as_alike():
    assert claims.g({"full": everywhere(accuracy=0.9), "blog": everywhere(accuracy=0.92)})[1]
    assert not claims.g({"full": everywhere(accuracy=0.9), "blog": everywhere(accuracy=0.8)})[1]
    assert not claims.g({"full": everywhere(), "blog": everywhere(search_ratio_text=0.4)})[1]


def test_text_search_that_helps_nobody_counts():
    assert claims.h({"full": everywhere(accuracy=0.9), "image-only": everywhere(accuracy=0.7)})[1]
    assert not claims.h({"full": everywhere(accuracy=0.7), "image-only": everywhere(accuracy=0.7)})[1]


def test_a_claim_met_on_some_seeds_is_told_as_holding_and_one_not_run_as_anything():
    good, bad = everywhere(search_ratio=0.99), everywhere(search_ratio=0.5)
    runs = {"full": {0: bad, 1: bad, 2: bad}, "no-penalty": {0: good, 1: good}}
    assert claims.row("d", runs, [0, 1, 2])[-1] == "holds, seeds 0 1"
    runs["no-penalty"][1] = bad
    assert claims.row("d", runs, [0, 1, 2])[-1].startswith("does not hold (met on 1 of 2 seeds)")
    assert claims.row("d", runs | {"no-penalty": {}}, [0])[-1] == "not yet run"


def test_the_teachers_demonstrations_are_no_conversations():
    world = World(0, replace(FULL, wrong=0.0))
    chat_shapes = set()
    for category in ("familiar", "familiar_fact", "unfamiliar", "unfamiliar_fact"):
        for example in world.questions(category, 40, "demonstrations"):
            turns = claims.demonstration(world, example)
            assert f"<answer> {example.answers[0]} </answer>" in turns[-1]
            chat_shapes.add((category, tuple("image" if "<img>" in t else "text" for t in turns[:-1])))
    of_known = {shape for category, shape in chat_shapes if category == "familiar_fact"}
    assert of_known == {(), ("text",), ("image", "text")}  # not the model's boundary


@pytest.mark.slow
def test_sft_samples_a_rollout_of_its_own_or_leaves_out_a_teachers_turn(folder, tmp_path, monkeypatch):
    for name in ("open_setup", "assign_advantages"):
        monkeypatch.setattr(train, name, getattr(train, name))
    batches, step = [], Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda self, parts, lr: batches.extend(parts) or step(self, parts, lr))
    small = dict(questions=8, mini_batch=8, eval_size=1, out=str(tmp_path / "out"), model=str(folder))
    options = {**Config.defaults("toy", "full"), **claims.SFT, **small, "steps": 1, "toy": "full"}
    world = World(0, replace(FULL, wrong=0.3))
    claims.foreign_teacher()
    train.train(Config(**options), SINGLE, world)
    (batch,) = batches
    assert 0 < len(batch) < 8  # a search that misled ended in a wrong answer
    for episode in batch:
        said = [turn for turn in episode.turns if turn.role == "assistant"]
        assert [turn.text for turn in said] == claims.demonstration(world, episode.example)
        assert sum(episode.loss_mask) == sum(turn.end - turn.start for turn in said)
        assert not any(any(episode.loss_mask[t.start : t.end]) for t in episode.turns if t.role == "tool")


def test_shapes_of_rollouts_are_miscounted(tmp_path):
    def line(*actions):
        return json.dumps({"turns": [{"role": "assistant", "action": action} for action in actions]}) + "\n"

    (tmp_path / "rollouts").mkdir()
    steps = [
        line("answer") + line("image_search", "text_search", "answer"),
        line("text_search", "answer") + line(None) + line("image_search", "image_search") + line("answer"),
    ]
    for number, text in enumerate(steps, 1):
        (tmp_path / f"rollouts/step-{number:06d}.jsonl").write_text(text)
    first, second = toy_runs.shapes(tmp_path)
    assert first == {"answer": 0.5, "image → answer": 0, "text → answer": 0, "image → text → answer": 0.5, "other": 0}
    assert (second["answer"], second["text → answer"], second["other"]) == (0.25, 0.25, 0.5)


# ---- what breaks


def test_a_run_that_goes_on_stands_there_as_dead(tmp_path):
    def told(log):
        (tmp_path / "raw-0.log").write_text(log)
        return what_breaks.row("raw", {}, tmp_path, [0])[-1]

    assert what_breaks.row("raw", {}, tmp_path, [0])[-1] == told("train: 3 of 80") == "not yet run"
    assert told("Traceback\nValueError: no such thing\n\nexit status 1\n") == "died: ValueError: no such thing"


def first_step(folder, out):
    """What the trainer says of one step in a world with thumbnails, cut into several micro-batches."""
    small = dict(questions=8, mini_batch=8, group_size=4, eval_size=1, steps=1, kl=0.0, max_tokens=256, zero_std="keep")
    options = {**Config.defaults("toy", "full"), **small, "loss_norm": "token", "micro_tokens": 1024, "toy": "full"}
    world = World(0, replace(FULL, thumbnails=True))
    train.train(Config(**options, out=str(out), model=str(folder)), SINGLE, world)
    records = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return next(record for record in records if "loss" in record)


@pytest.fixture(scope="module")
def sound(folder, tmp_path_factory):
    return first_step(folder, tmp_path_factory.mktemp("sound") / "out")


BENDS = ("train_tool_tokens", "mean_per_micro_batch", "linear_positions", "ban_nothing")


@pytest.mark.slow
@pytest.mark.parametrize("bend", BENDS)
def test_an_error_that_is_to_be_shown_is_not_made(bend, sound, folder, tmp_path, monkeypatch):
    for place, name in (
        *((Trainer, name) for name in ("step", "_micro_batches", "forward_backward")),
        (what_breaks.pack, "mrope_positions"),
        (what_breaks.Chat, "suppressed_tokens"),
    ):
        monkeypatch.setattr(place, name, getattr(place, name))  # to be put back
    getattr(what_breaks, bend)()
    bent = first_step(folder, tmp_path / "out")
    assert bent["skipped_updates"] == 0 and bent["grad_norm"] != sound["grad_norm"]


# ---- losses


def test_a_curve_that_dips_or_falls_reaches_its_reward_too_early():
    assert losses.steps_to_most([0.0] * 10 + [1.0] * 10) == 15, "smoothed over five steps"
    rising = [step / 100 for step in range(101)]
    assert losses.steps_to_most(rising) == 92
    assert losses.steps_to_most([0.0, 0.5, 0.1, 1.0, 0.9, 1.0, 1.0, 1.0]) == 8, "after the dip"
    assert losses.steps_to_most(rising[::-1]) == losses.steps_to_most([0.5] * 4) == 0


def test_groups_of_equal_rewards_before_and_after_are_not_told_apart():
    plain = {"zero_std_groups": 8}
    sampled = {"zero_std_groups": 2, "resampled": {"zero_std_first": 16}}
    assert losses.zero_std([plain, plain]) == (0.25, 0.25)
    assert losses.zero_std([sampled, plain]) == (0.375, 5 / 32)


def test_a_variation_has_another_loss_than_the_command_line_makes_of_its_name():
    for name in ("dr_grpo", "gspo", "cispo"):
        options = losses.VARIANTS[name][1].options
        config = parse(["--loss", name, "--mini-batch", "8"])
        assert {key: getattr(config, key) for key in options} == options


# ---- recorded conversations through a checkpoint


@pytest.mark.slow
def test_a_turn_that_differs_is_replayed_as_the_same(folder, tmp_path, capsys):
    world, data, file = World(0, BASIC), tmp_path / "data.jsonl", tmp_path / "said.jsonl"
    rows = []
    for example in world.questions("unfamiliar", 3, "replay"):
        (tmp_path / f"{example.id}.png").write_bytes(example.image)
        rows.append({"id": example.id, "image": f"{example.id}.png", "question": example.question, "answers": ["x"]})
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    search = {"response": LOOK_IT_UP, "action": "image_search", "tool_result": {"titles": ["bako of dupa"]}}

    def replayed(answers):
        turns = [[search, {"response": answer, "action": "answer"}] for answer in answers]
        lines = [json.dumps({"data_id": row["id"], "turns": two}) + "\n" for row, two in zip(rows, turns)]
        file.write_text("".join(lines))
        options = (
            f"--model {folder} --recipe toy --toy basic --data {data} --search replay:{file} --out {tmp_path / 'out'}"
        )
        replay_released.main(options.split())
        return capsys.readouterr().out

    told = replayed(["<answer> nothing the model says </answer>"] * 3)
    assert "| 2 | 3 | 0 |" in told
    now = [ast.literal_eval(line.split("now:")[1].strip()) for line in told.splitlines() if "now:" in line]
    second = [
        text for text, line in zip(now, [x for x in told.splitlines() if ", turn " in x]) if line.endswith("turn 2")
    ]
    assert "| 2 | 3 | 2 |" in replayed([*second[:2], "another"])
