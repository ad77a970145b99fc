"""Ranks against a single process: equal gradients and tokens however work is distributed, and no rank waits forever."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import zlib
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import test_engine
import torch
from crew import Crew, environment, free_port, on_one
from helpers import SGD, conversation, each_family, report, tiny_config, tiny_model, with_adapters
from safetensors.torch import load_file
from test_update import EXAMPLE, SUPPRESSED, TowerPasses, frozen, made, relative
from torch.distributed.fsdp import FSDPModule

import train as train_program
from mmsr import lora, reward
from mmsr.batch import assign_advantages
from mmsr.config import Config, parse
from mmsr.episode import Episode
from mmsr.model import VLModel
from mmsr.pretrained.load import load
from mmsr.pretrained.save import save, save_weights
from mmsr.setup.policy import load_model, open_model
from mmsr.system import parallel
from mmsr.system.errors import UserError
from mmsr.system.parallel import OtherRankFailed, Ranks, balanced_partition, full_state_dict, shard, unsharded
from mmsr.update import MasterWeights, Trainer
from mmsr.vision import image_tokens, load_image

# FSDP can give up a pass in its middle since torch 2.13. Before, a rank that runs out of memory ends the run.
needs_restart = pytest.mark.skipif(not hasattr(FSDPModule, "reset_iter_state"), reason="needs torch 2.13")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pair():
    crew = Crew(2)
    yield crew
    crew.stop()


@pytest.mark.parametrize("name", ["", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_the_allocator_is_told_otherwise_than_the_user_did(name, monkeypatch):
    for other in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.setenv(other, "")  # so that it is put back
        monkeypatch.delenv(other)
    if name:
        monkeypatch.setenv(name, "backend:native")
    with parallel.distributed("cpu"):
        told = {key: value for key, value in os.environ.items() if key.endswith("ALLOC_CONF")}
    assert told == ({name: "backend:native"} if name else {"PYTORCH_ALLOC_CONF": "expandable_segments:True"})


def texts(group: int, members: int = 2) -> list[Episode]:
    """A group without pictures."""
    episodes = []
    for m in range(members):
        ids, _ = conversation(300 + group, 6)
        turn, _ = conversation(400 + 5 * group + m, 3 + m)
        mask = [0] * len(ids) + [1] * len(turn)
        lists = (ids.tolist() + turn.tolist(), mask, [-5.0 * x for x in mask])
        episodes.append(Episode(EXAMPLE, group, m, *lists, [], len(ids), advantage=1.0 - 2.0 * m))
    return episodes


# The rank of each of the groups 0 … 4. Groups 3 and 4 have no pictures.
ASSIGNMENTS = {
    "even": [0, 1, 0, 1, 0],
    "one rank has text only": [0, 0, 0, 1, 1],
    "one rank has nothing": [0, 0, 0, 0, 0],
    "the other has nothing": [1, 1, 1, 1, 1],
    "four": [0, 1, 3, 3, 3],
}


def batch() -> list[Episode]:
    return [*made(), *texts(3), *texts(4)]


def local_episodes(ranks: Ranks, assignment: str) -> list[Episode]:
    return [e for e in batch() if ranks.size == 1 or ASSIGNMENTS[assignment][e.group_id] == ranks.rank]


def sharded(ranks: Ranks, seed: int, dtype=torch.float32, across="node", **changes):
    return shard(tiny_model(seed, **changes), ranks, dtype, across)


def build(ranks: Ranks, options: dict, changes: dict, recompute: bool = False, across="node") -> Trainer:
    model = sharded(ranks, 1, across=across, **changes)
    model.checkpoint_blocks = model.visual.checkpoint_blocks = recompute
    options = {"max_grad_norm": 1e9, "micro_tokens": 60} | options
    if options.get("kl"):
        options["reference"] = sharded(ranks, 2, across=across, **changes).requires_grad_(False)
    optimizer = SGD(model)
    return Trainer(model, optimizer, SUPPRESSED, ranks=ranks, **options)


def whole_gradient(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {
        name: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad.clone()
        for name, p in trainer.model.named_parameters()
        if p.grad is not None
    }


def gradient(ranks: Ranks, assignment: str, options=None, changes=None, recompute=False, across="node"):
    """Gradient of one update, whole, and the metrics."""
    trainer = build(ranks, options or {}, changes or {}, recompute, across)
    kept = {}
    trainer.optimizer.step = lambda lr: kept.update(whole_gradient(trainer))
    metrics = trainer.step([local_episodes(ranks, assignment)], 0.1)
    return kept, metrics


def check_gradient(crew, record_property, what: str, *args) -> None:
    alone, metrics = on_one(gradient, *args)
    for found, other in crew(gradient, *args):
        difference = relative(found, alone)
        report(record_property, f"gradient, {what}", difference)
        assert difference < 1e-5
        for key in ("loss", "kl", "entropy", "logp_gap", "logp_gap_max", "grad_norm", "encoded", "trained_unique"):
            assert other[key] == pytest.approx(metrics[key], rel=1e-4, abs=1e-6), key


@each_family
@pytest.mark.first_is_quick
@pytest.mark.parametrize("assignment", [d for d in ASSIGNMENTS if d != "four"])
def test_gradient_does_not_depend_on_how_episodes_are_dealt(pair, assignment, record_property):
    check_gradient(pair, record_property, assignment, assignment, {"kl": 0.3})


def second_gradient(ranks: Ranks, options: dict):
    """Gradient of the second of two updates, for which ratios are not 1 and some are clipped; and the metrics."""
    trainer = build(ranks, options, {})
    step, kept = trainer.optimizer.step, []

    def recorded(lr):
        kept.append(whole_gradient(trainer))
        step(lr)

    trainer.optimizer.step = recorded
    episodes = local_episodes(ranks, "even")
    first, second = ([e for e in episodes if (e.group_id < 2) == early] for early in (True, False))
    metrics = trainer.step([first, second], 0.1)
    return kept[1], metrics


@pytest.mark.first_is_quick
@pytest.mark.parametrize(
    "loss",
    [
        dict(loss="gspo", clip_low=0.005, clip_high=0.005, importance_bound=math.exp(8)),
        dict(loss="cispo", loss_norm="token", clip_low=1.0, clip_high=0.01),
        dict(loss="dr_grpo", loss_norm="constant", token_limit=5, clip_low=0.01, clip_high=0.01),
    ],
    ids=str,
)
def test_gradient_of_another_loss_depends_on_how_episodes_are_dealt(pair, loss, record_property):
    options = {"kl": 0.3, **loss}
    alone, metrics = on_one(second_gradient, options)
    assert 0.02 < metrics["clip_fraction"] < 0.98
    assert (0.02 < metrics["masked_fraction"] < 0.98) == ("importance_bound" in loss)
    for found, other in pair(second_gradient, options):
        difference = relative(found, alone)
        report(record_property, f"gradient of a second update, {loss['loss']}", difference)
        assert difference < 1e-5
        for key in ("loss", "clip_fraction", "masked_fraction", "grad_norm"):
            assert other[key] == pytest.approx(metrics[key], rel=1e-4, abs=1e-6), key


def rewarded(ranks: Ranks, advantage: str) -> list[float]:
    """The advantages of the batch's episodes that are this rank's."""
    episodes = local_episodes(ranks, "even")
    for episode in episodes:
        episode.reward = (7 * episode.group_id + 3 * episode.sample) % 5 / 4
    assign_advantages(episodes, Config(advantage=advantage), ranks)
    return [(episode.group_id, episode.sample, episode.advantage) for episode in episodes]


@pytest.mark.parametrize("advantage", ["batch", "group-batch"])
def test_advantages_by_the_batch_are_those_of_a_ranks_own_part(pair, advantage):
    alone = on_one(rewarded, advantage)
    found = sorted(sum(pair(rewarded, advantage), []))
    assert [value for *_, value in found] == pytest.approx([value for *_, value in sorted(alone)], abs=1e-12)
    assert len({round(value, 6) for *_, value in alone}) > 5


@each_family
def test_gradient_of_tied_head_token_mean_and_recomputed_blocks(pair, record_property):
    changes = {"tie_word_embeddings": True}
    check_gradient(pair, record_property, "tied", "even", {"loss_norm": "token"}, changes, True)


# ---- guards


class Once:
    """Raises an error the n-th time it is called."""

    def __init__(self, n: int, error: type[Exception]):
        self.left, self.error = n, error

    def __call__(self, *_):
        self.left -= 1
        if self.left == 0:
            raise self.error("simulated")


def fail_in(trainer: Trainer, place: str, once: Once) -> None:
    """Have `once` called in the middle of a forward or a backward pass."""
    block = trainer.model.visual.blocks[1] if "vision" in place else trainer.model.model.layers[0]
    inner = block.mlp
    if place.endswith("backward"):

        def hook(_, __, out) -> None:
            if out.requires_grad:
                out.register_hook(once)

        inner.register_forward_hook(hook)
    else:
        inner.register_forward_pre_hook(once)


def gradient_after_running_out(ranks: Ranks, place: str, failing: int, n: int, tokens: int = 120, assignment="even"):
    """The gradients of an update in which one rank once runs out of memory, and of the next; the micro-batch size."""
    trainer = build(ranks, {"kl": 0.3, "micro_tokens": tokens}, {})
    trainer.step([[]], 0.0)  # the dry run
    fail_in(trainer, place, Once(n if ranks.rank == failing else 0, torch.OutOfMemoryError))
    kept = []
    trainer.optimizer.step = lambda lr: kept.append(whole_gradient(trainer))
    for _ in range(2):
        trainer.step([local_episodes(ranks, assignment)], 0.0)
    return kept, trainer.micro_tokens


@pytest.mark.first_is_quick
@needs_restart
@pytest.mark.parametrize("place, failing, n", [("forward", 1, 2), ("backward", 0, 1), ("backward", 1, 2)])
def test_out_of_memory_on_one_rank_leads_to_the_same_gradient(pair, place, failing, n, record_property):
    alone, _ = on_one(gradient, "even", {"kl": 0.3})
    for kept, tokens in pair(gradient_after_running_out, place, failing, n):
        assert tokens < 120
        for found in kept:
            difference = relative(found, alone)
            report(record_property, f"gradient after running out of memory, {place} pass {n}", difference)
            assert difference < 1e-5


def test_out_of_memory_of_a_single_process_leads_to_the_same_gradient():
    alone, _ = on_one(gradient, "even", {"kl": 0.3})
    kept, tokens = on_one(gradient_after_running_out, "backward", 0, 1, 10**6)
    assert all(relative(found, alone) < 1e-5 for found in kept) and len(kept) == 2 and tokens < 400


@needs_restart
def test_out_of_memory_in_one_episode_is_a_user_error_on_all_ranks(pair):
    for message in pair(message_of_running_out, "vision forward"):
        assert "rank 1 ran out of memory in its vision pass" in message and "--max-pixels" in message
    for message in pair(message_of_running_out, "backward"):
        assert "rank 1 ran out of memory in its micro-batch" in message


def message_of_running_out(ranks: Ranks, place: str) -> str:
    trainer = build(ranks, {"micro_tokens": 1}, {})
    trainer.step([[e for e in local_episodes(ranks, "even") if e.group_id > 2]], 0.0)  # no picture on any rank
    fail_in(trainer, place, Once(int(ranks.rank == 1), torch.OutOfMemoryError))
    with pytest.raises(UserError) as error:
        trainer.step([local_episodes(ranks, "even")], 0.0)
    return str(error.value)


class Heard(dict):
    """Keeps every row of collectives that a pass of a name has had."""

    def setdefault(self, name, row):
        super().setdefault(name, set()).add(tuple((str(call.op), call.input_size, call.dtype) for call in row))


def rows_of_some_updates(ranks: Ranks) -> dict[str, set]:
    trainer = build(ranks, {"kl": 0.3}, {})
    trainer.lockstep.recorded = Heard()
    for assignment in ("even", "one rank has text only", "one rank has nothing"):
        model = trainer.model
        with unsharded(model) as whole:
            test_engine.run(whole, test_engine.groups(1 + ranks.rank, 2))
        episodes = local_episodes(ranks, assignment)
        first = [e for e in episodes if e.group_id < 2]
        second = [e for e in episodes if e.group_id >= 2]
        trainer.step([first, second], 0.1)
    return dict(trainer.lockstep.recorded)


@each_family
def test_passes_are_always_the_same_row_of_collectives(pair):
    """What a rank that runs out of memory counts on: empty passes and full ones, after generation, text alone."""
    first, second = pair(rows_of_some_updates)
    assert first == second and len(first) == 5
    assert {name: len(rows) for name, rows in first.items()} == dict.fromkeys(first, 1)


def rows_of_updates_with_adapters(ranks: Ranks, targets) -> dict[str, set]:
    trainer = adapter_trainer(ranks, "node", targets)
    trainer.lockstep.recorded = Heard()
    for assignment in ("even", "one rank has text only", "one rank has nothing"):
        with unsharded(trainer.model) as whole:
            sampler = lora.for_sampling(whole, trainer.model, torch.float32)
            test_engine.run(sampler, test_engine.groups(1 + ranks.rank, 2))
            del sampler, whole
        episodes = local_episodes(ranks, assignment)
        first = [e for e in episodes if e.group_id < 2]
        second = [e for e in episodes if e.group_id >= 2]
        trainer.step([first, second], 0.1)
    without_pictures = [e for e in local_episodes(ranks, "even") if not e.images]
    trainer.step([without_pictures], 0.1)
    return dict(trainer.lockstep.recorded)


@pytest.mark.slow
@pytest.mark.parametrize("targets", [(), ("vision",), ("vision", "model.layers.1")], ids=str)
def test_passes_with_adapters_are_not_always_the_same_row_of_collectives(pair, targets):
    first, second = pair(rows_of_updates_with_adapters, targets)
    assert first == second and len(first) == (5 if targets else 4)
    assert {name: len(rows) for name, rows in first.items()} == dict.fromkeys(first, 1)


def skipped(ranks: Ranks, what: str):
    trainer = build(ranks, {"max_skipped": 2}, {})
    before = full_state_dict(trainer.model, ranks, torch.float32)
    before = {name: value.clone() for name, value in before.items()}
    bad, good = local_episodes(ranks, "even"), local_episodes(ranks, "even")
    if ranks.rank == ranks.size - 1:
        if what == "loss":
            bad[0].logps = [math.nan] * len(bad[0].logps)
            trainer.loss = replace(trainer.loss, importance_cap=2.0)
        else:
            setattr(bad[0], what, math.inf)
    found = [trainer.step([bad], 0.1)]
    after = full_state_dict(trainer.model, ranks, torch.float32)
    same = all(torch.equal(after[name], before[name]) for name in before)
    found.append(trainer.step([good], 0.0))
    with pytest.raises(UserError, match="2 updates in a row"):
        trainer.step([bad, bad], 0.1)
    return same, found


@pytest.mark.slow
@pytest.mark.parametrize("what", ["reward", "advantage", "loss"])
def test_value_that_is_not_finite_on_one_rank_skips_the_update_on_all(pair, what):
    for same, (bad, good) in [on_one(skipped, what), *pair(skipped, what)]:
        assert same and bad["skipped_updates"] == 1 and good["skipped_updates"] == 0
        assert math.isfinite(bad["loss"]) and good["loss"] != 0


def trained_weights(ranks: Ranks, dtype=torch.float32, steps: int = 3):
    """Whole weights after steps of the optimizer that train.py uses, clipped, two updates each."""
    stored = dtype if ranks.size == 1 else torch.float32
    model = shard(tiny_model(1).to(dtype).to(stored), ranks, dtype)
    optimizer = MasterWeights(model, weight_decay=0.0)
    trainer = Trainer(model, optimizer, SUPPRESSED, micro_tokens=60, max_grad_norm=0.5, ranks=ranks)
    episodes = local_episodes(ranks, "even")
    first = [e for e in episodes if e.group_id < 2]
    second = [e for e in episodes if e.group_id >= 2]
    for _ in range(steps):
        trainer.step([first, second], 1e-4)
    return full_state_dict(model, ranks, dtype)


@each_family
def test_weights_after_some_steps_equal_those_of_one_process(pair, record_property):
    alone = on_one(trained_weights)
    main, other = pair(trained_weights)
    difference = max((main[name] - alone[name]).abs().max().item() for name in alone)
    report(record_property, "weights after 6 updates of AdamW at rate 1e-4", difference)
    assert main.keys() == alone.keys() and not other
    assert difference < 2e-5, "Adam magnifies noise where a gradient is nearly 0, but not beyond a part of a step"


def test_shards_used_in_bf16_are_fp32_masters(pair):
    alone, (main, _) = on_one(trained_weights, torch.bfloat16), pair(trained_weights, torch.bfloat16)
    before = tiny_model(1).bfloat16().state_dict()
    moved = sum((main[name] != before[name]).sum().item() for name in before)
    apart = max((main[name].float() - alone[name].float()).abs().max().item() for name in before)
    assert moved > 1000 and apart < 0.02


# ---- adapters, whole on every rank or beside sharded weights

FORMS = ("none", "node")  # of the frozen weights
BOTH = ("decoder", "vision")


def beside(ranks: Ranks, across: str, targets=(), dtype=torch.float32) -> VLModel:
    """A model with adapters. Its frozen weights are whole on every rank, or sharded."""
    model = tiny_model(1).to(dtype).requires_grad_(False)  # before it is sharded: FSDP looks once
    if across != "none":
        model = shard(model, ranks, dtype, across)
    return with_adapters(model, targets)


def adapter_trainer(ranks: Ranks, across: str, targets=(), **options) -> Trainer:
    model = beside(ranks, across, targets)
    options = {"max_grad_norm": 1e9, "micro_tokens": 60, "kl": 0.3, "reference": model} | options
    options["features"] = None if lora.trains_tower(model) else {}
    return Trainer(model, SGD(model), SUPPRESSED, ranks=ranks, **options)


def adapter_gradient(ranks: Ranks, across: str, targets, assignment: str):
    """Gradients of an update, and metrics."""
    trainer = adapter_trainer(ranks, across, targets)
    kept = {}
    trainer.optimizer.step = lambda lr: kept.update(whole_gradient(trainer))
    metrics = trainer.step([local_episodes(ranks, assignment)], 0.1)
    return kept, metrics


DEALT = [("none", BOTH, "one rank has text only"), ("node", BOTH, "one rank has text only")]
SLOW = [
    pytest.param("qwen2_5", across, targets, assignment, marks=pytest.mark.slow)
    for across in FORMS
    for targets in ((), ("vision",), BOTH)
    for assignment in ASSIGNMENTS
    if assignment != "four" and (across, targets, assignment) not in DEALT
]


@pytest.mark.parametrize(
    "each_family, across, targets, assignment",
    [*(("qwen3", *case) for case in DEALT), *(("qwen2_5", *case) for case in DEALT), *SLOW],
    ids=str,
    indirect=["each_family"],
)
def test_gradient_of_adapters_depends_on_how_episodes_are_dealt(
    each_family, pair, across, targets, assignment, record_property
):
    alone, metrics = on_one(adapter_gradient, across, targets, assignment)
    assert alone and all(lora.is_adapter(name) for name in alone)
    for found, other in pair(adapter_gradient, across, targets, assignment):
        difference = relative(found, alone)
        report(record_property, f"gradient of adapters {targets}, {assignment}, {across}", difference)
        assert difference < 1e-5
        for key in ("loss", "kl", "entropy", "logp_gap", "logp_gap_max", "grad_norm", "encoded", "trained_unique"):
            assert other[key] == pytest.approx(metrics[key], rel=1e-4, abs=1e-6), key


def adapters_after_running_out(ranks: Ranks, across: str, place: str, failing: int, n: int, targets=(), tokens=120):
    """The gradients of an update in which one rank once runs out of memory, and of the next; the micro-batch size."""
    trainer = adapter_trainer(ranks, across, targets, micro_tokens=tokens)
    trainer.step([[]], 0.0)  # the dry run
    fail_in(trainer, place, Once(n if ranks.rank == failing else 0, torch.OutOfMemoryError))
    kept = []
    trainer.optimizer.step = lambda lr: kept.append(whole_gradient(trainer))
    for _ in range(2):
        trainer.step([local_episodes(ranks, "even")], 0.0)
    return kept, trainer.micro_tokens


@needs_restart
@pytest.mark.parametrize(
    "across, place, failing, n",
    [
        pytest.param("none", "forward", 1, 2, marks=pytest.mark.slow),
        ("none", "vision forward", 1, 1),
        ("node", "backward", 0, 1),
        pytest.param("node", "vision forward", 1, 1, marks=pytest.mark.slow),
    ],
)
def test_a_rank_with_adapters_that_runs_out_of_memory_leaves_the_other_waiting(pair, across, place, failing, n):
    wanted, _ = on_one(adapter_gradient, across, (), "even")
    if "vision" in place:
        for message in pair(message_of_adapters_running_out, across):
            assert "rank 1 ran out of memory in its vision pass" in message
        return
    for kept, tokens in pair(adapters_after_running_out, across, place, failing, n):
        assert tokens < 120 and len(kept) == 2
        assert max(relative(found, wanted) for found in kept) < 1e-5


def message_of_adapters_running_out(ranks: Ranks, across: str) -> str:
    """Features are not known, as where turns are imitated and nothing is sampled."""
    trainer = adapter_trainer(ranks, across)
    trainer.step([[e for e in local_episodes(ranks, "even") if e.group_id > 2]], 0.0)  # no picture on any rank
    fail_in(trainer, "vision forward", Once(int(ranks.rank == 1), torch.OutOfMemoryError))
    with pytest.raises(UserError) as error:
        trainer.step([local_episodes(ranks, "even")], 0.0)
    return str(error.value)


def adapters_after_updates(ranks: Ranks, across: str, assignment: str):
    """Whole weights after two updates by the optimizer that train.py uses, and the step's metrics."""
    model = beside(ranks, across)
    options = dict(kl=0.3, reference=model, features={}, micro_tokens=60, max_grad_norm=0.5)
    trainer = Trainer(model, MasterWeights(model, weight_decay=0.0), SUPPRESSED, ranks=ranks, **options)
    episodes = local_episodes(ranks, assignment)
    first = [e for e in episodes if e.group_id < 2]
    second = [e for e in episodes if e.group_id >= 2]
    metrics = trainer.step([first, second], 1e-3)
    adapters = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    return adapters, full_state_dict(model, ranks, torch.float32), metrics


@pytest.mark.parametrize("across", FORMS)
def test_adapters_part_from_rank_to_rank_or_from_one_process(pair, across, record_property):
    alone, weights, metrics = on_one(adapters_after_updates, across, "one rank has text only")
    (first, whole, told), (second, _, told_) = pair(adapters_after_updates, across, "one rank has text only")
    assert all(torch.equal(first[name], second[name]) for name in alone), "to the bit, or they drift apart"
    difference = max((first[name] - alone[name]).abs().max().item() for name in alone)
    report(record_property, f"adapters after two updates of AdamW at rate 1e-3, {across}", difference)
    assert difference < 5e-5 and first.keys() == second.keys() == alone.keys()
    before = with_adapters(tiny_model(1)).state_dict()
    for name, weight in whole.items():
        assert torch.equal(weight, before[name]) != lora.is_adapter(name), name
        assert torch.allclose(weight, weights[name], atol=5e-5)
    assert told == told_ == pytest.approx(metrics, rel=1e-3, abs=1e-5)


def frozen_parts(ranks: Ranks, parts: list[str], assignment: str):
    """Whole weights after two updates in which parts are not trained, metrics, and what the tower did."""
    model = frozen(parts)
    model = shard(model, ranks, torch.float32, "node")
    features = None if lora.trains_tower(model) else {}
    reference = sharded(ranks, 1).requires_grad_(False)
    options = dict(kl=0.3, reference=reference, features=features, micro_tokens=60, max_grad_norm=1e9)
    trainer = Trainer(model, SGD(model), SUPPRESSED, ranks=ranks, **options)
    trainer.step([[]], 0.0)
    passes = TowerPasses(model)
    episodes = local_episodes(ranks, assignment)
    first = [e for e in episodes if e.group_id in (0, 3)]
    second = [e for e in episodes if e.group_id not in (0, 3)]
    metrics = trainer.step([first, second], 0.05)
    return full_state_dict(model, ranks, torch.float32), metrics, passes.backward, len(set(passes.seen))


@pytest.mark.parametrize(
    "parts",
    [
        ["vision"],
        pytest.param(["decoder"], marks=pytest.mark.slow),
        pytest.param(["embedding", "model.layers.0"], marks=pytest.mark.slow),
        pytest.param(["head", "merger"], marks=pytest.mark.slow),
        pytest.param(["model", "head"], marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.parametrize("assignment", ["one rank has text only"])
def test_frozen_parts_move_or_differ_from_one_process(pair, parts, assignment, record_property):
    alone, metrics, backward, _ = on_one(frozen_parts, parts, assignment)
    (whole, told, backward_, encoded), (_, told_, _, encoded_) = pair(frozen_parts, parts, assignment)
    before = tiny_model(1).state_dict()
    names = lora.frozen(before, parts)
    for name, weight in whole.items():
        assert torch.equal(weight, before[name]) == (name in names), name
    difference = max((whole[name] - alone[name]).abs().max().item() for name in whole)
    report(record_property, f"weights after two updates, {parts} frozen", difference)
    assert difference < 1e-5
    assert told == told_ == pytest.approx(metrics, rel=1e-3, abs=1e-5)
    if parts == ["vision"]:
        assert not backward and not backward_, "a backward pass of the tower"
        assert told["encoded"] == metrics["encoded"]


# ---- generation and weights


def generated(ranks: Ranks, dtype=torch.float32):
    """Tokens of groups assigned unevenly, with training between the rounds; in the second one rank has no group."""
    model = tiny_model(4)
    with torch.no_grad():
        model.lm_head.weight.mul_(4)
    model = shard(model, ranks, dtype)
    trainer = Trainer(model, SGD(model), SUPPRESSED, ranks=ranks)
    found, steps = {}, []
    for assignment in ({0: [0], 1: [1, 2, 3]}, {0: [], 1: [0, 1, 2, 3]}, {0: [3, 1, 0], 1: [2]}):
        mine = range(4) if ranks.size == 1 else assignment[ranks.rank]
        batch = [group for i in mine for group in test_engine.groups(1, 3, first=i)]
        with unsharded(model) as whole:
            steps.append(test_engine.run(whole, batch).counts["decode_steps"] if batch else 0)
        found.setdefault("tokens", []).append(dict(zip(mine, test_engine.texts(batch)[::3])))
        trainer.step([local_episodes(ranks, "even")], 0.05)
    return found["tokens"], steps


@each_family
def test_tokens_do_not_depend_on_the_number_of_ranks(pair):
    """Ranks with different numbers of decode steps, or none, between updates of the weights."""
    alone, _ = on_one(generated)
    (first, steps), (second, other_steps) = pair(generated)
    assert steps != other_steps and steps[1] == 0
    assert [a | b for a, b in zip(first, second)] == alone
    assert alone[0] != alone[2], "training should have changed what is sampled"


@contextmanager
def through_fsdp(model):
    """What `unsharded` was before it gave a plain twin: FSDP's own modules, hooks and all, with whole weights."""
    model.set_reshard_after_forward(False)
    units = parallel.fsdp_units(model)
    for unit in units:
        unit.unshard()
    yield model
    model.set_reshard_after_forward(True)
    for unit in units:
        unit.reshard()


def through_twin_and_fsdp(ranks: Ranks, tied: bool) -> list[dict]:
    """Greedy and sampled tokens of both, before and after an update; what the twin is made of."""
    sharp = tiny_model(4, tie_word_embeddings=tied)
    with torch.no_grad():
        sharp.head_weight.mul_(4)
    model = shard(sharp, ranks, torch.float32)
    trainer = Trainer(model, SGD(model), SUPPRESSED, ranks=ranks)
    found = []
    for _ in range(2):
        sharded = sum(p.to_local().nbytes for p in model.parameters())
        with unsharded(model) as twin:
            places = {name: p.data_ptr() for name, p in model.named_parameters()}
            seen = {
                "same tensors": {name: p.data_ptr() for name, p in twin.named_parameters()} == places,
                "hooks": sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in twin.modules()),
                "trains": all(p.requires_grad for p in model.parameters()),
                "is sharded": any(isinstance(m, parallel.FSDPModule) for m in twin.modules()),
            }
        assert sharded == sum(p.to_local().nbytes for p in model.parameters()), "it is back in its shards"
        for how, temperature in (("greedy", 0.0), ("sampled", 1.0)):
            for route, opened in (("twin", unsharded), ("fsdp", through_fsdp)):
                batch = test_engine.groups(3, 3, first=ranks.rank)
                with opened(model) as whole:
                    test_engine.run(whole, batch, temperature=temperature)
                seen[how, route] = test_engine.texts(batch)
        found.append(seen)
        trainer.step([local_episodes(ranks, "even")], 0.05)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_ranks_decode_through_hooks_or_other_weights(pair, tied):
    """The plain twin has FSDP's gathered tensors themselves, none of its hooks, and draws the same tokens."""
    for before, after in pair(through_twin_and_fsdp, tied):
        for seen in (before, after):
            assert seen["same tensors"] and not seen["hooks"] and not seen["is sharded"] and seen["trains"]
            assert seen["greedy", "twin"] == seen["greedy", "fsdp"]
            assert seen["sampled", "twin"] == seen["sampled", "fsdp"]
        assert before["sampled", "twin"] != after["sampled", "twin"], "the update should have changed the tokens"


def in_bf16(ranks: Ranks):
    """fp32 shards used in bfloat16: types inside, and a gradient."""
    model = shard(tiny_model(1), ranks, torch.bfloat16)
    optimizer = SGD(model)
    trainer = Trainer(model, optimizer, SUPPRESSED, max_grad_norm=1e9, ranks=ranks)
    kept = {}
    trainer.optimizer.step = lambda lr: kept.update(whole_gradient(trainer))
    trainer.step([local_episodes(ranks, "even")], 0.1)
    with unsharded(model) as plain:
        whole = {p.dtype for p in plain.parameters()}
    return kept, whole, {p.dtype for p in model.parameters()}


def test_fp32_shards_compute_in_bf16(pair):
    alone, _ = on_one(gradient, "even")
    for kept, whole, kept_as in pair(in_bf16):
        assert whole == {torch.bfloat16} and kept_as == {torch.float32}
        assert relative(kept, alone) < 0.1


def loaded(ranks: Ranks, folder: str):
    model = load_model(Path(folder), torch.float32, torch.float32, ranks, "node")
    local = sum(getattr(p, "to_local", lambda p=p: p)().numel() for p in model.parameters())
    return full_state_dict(model, ranks, torch.float32), local


@each_family
@pytest.mark.parametrize("tied", [False, True])
def test_loading_a_folder_gives_each_rank_its_shards(pair, tied, tmp_path):
    model = tiny_model(3, tie_word_embeddings=tied)
    save_weights(model.config, model.state_dict(), tmp_path, shard_bytes=10**5)
    (main, first), (_, second) = pair(loaded, str(tmp_path))
    assert main.keys() == model.state_dict().keys()
    assert all(torch.equal(main[name], value) for name, value in model.state_dict().items())
    whole = sum(p.numel() for p in model.parameters())
    assert first + second == whole and max(first, second) < 0.6 * whole


def load_error(ranks: Ranks, folder: str) -> str:
    with pytest.raises((UserError, OtherRankFailed)) as error:
        loaded(ranks, folder)
    return str(error.value)


def test_broken_folder_is_an_error_on_all_ranks(pair, tmp_path):
    weights = tiny_model().state_dict()
    weights.pop("model.norm.weight")
    save_weights(tiny_config(), weights, tmp_path)
    first, second = pair(load_error, str(tmp_path))
    assert "model.norm.weight" in first and second.startswith("rank 0 failed") and "model.norm.weight" in second


# ---- what ranks tell each other


def told(ranks: Ranks):
    total = ranks.sum({"a": 1, ("b", ranks.rank): 0.5})
    with pytest.raises((ValueError, OtherRankFailed)) as error, ranks.sync_errors():
        if ranks.rank == 1:
            raise ValueError("row 7")
    made_by = ranks.main_process_first("once", lambda: (time.sleep(0.3 * ranks.main), time.monotonic())[1])
    return total, ranks.max(ranks.rank * 2), ranks.gather([ranks.rank]), str(error.value), made_by


def test_ranks_add_up_agree_and_wait(pair):
    (total, most, items, stopped, first), (total_, most_, items_, own, second) = pair(told)
    assert total == total_ == {"a": 2, ("b", 0): 0.5, ("b", 1): 0.5} and most == most_ == 2
    assert items == [0, 1] and items_ == [] and first < second
    assert own == "row 7" and stopped == "rank 1 failed: ValueError: row 7"


def interrupted_wait(ranks) -> float:
    """Seconds after which a Ctrl-C reaches a rank that waits for the main rank's work."""
    signal.setitimer(signal.ITIMER_REAL, 0 if ranks.main else 0.5)
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    start = time.monotonic()
    try:
        ranks.main_process_first("long", lambda: time.sleep(2 * ranks.main))
    except KeyboardInterrupt:
        return time.monotonic() - start
    return 0.0


def test_a_rank_that_waits_for_the_main_rank_does_not_hear_a_ctrl_c(pair):
    assert 0.4 < pair(interrupted_wait)[1] < 1.5


def test_a_rank_that_lost_another_says_so_even_where_the_error_says_nothing():
    with pytest.raises(RuntimeError) as lost:
        exec(compile("raise RuntimeError", "distributed_c10d.py", "exec"))
    told = parallel.failure_message("rank 0 of 2", lost.value)
    assert told == "rank 0 of 2 lost another rank, or waited for it too long: RuntimeError"


def test_groups_are_dealt_evenly_by_load():
    assert balanced_partition([1, 1, 1], 1) == [[0, 1, 2]]
    assert balanced_partition([], 2) == [[], []]
    assert balanced_partition([5], 2) == [[0], []]
    loads = [(37 * i) % 23 + 1 for i in range(41)]
    parts = balanced_partition(loads, 4)
    assert sorted(i for part in parts for i in part) == list(range(41))
    assert {len(part) for part in parts} == {10, 11}
    assert all(part == sorted(part) for part in parts)
    sums = []
    for part in parts:
        sums.append(sum(loads[i] for i in part))
    assert max(sums) - min(sums) <= max(loads) / 2, sums


def test_image_tokens_are_those_of_the_loaded_picture():
    from helpers import picture_bytes

    for size in [(60, 40), (300, 200), (28, 400)]:
        data = picture_bytes(*size)
        assert image_tokens(data, 56 * 56, 200 * 200) == load_image(data, 56 * 56, 200 * 200).tokens
    assert image_tokens(b"no picture") == 0


# ---- four ranks, two machines


@pytest.fixture(scope="module")
def four():
    crew = Crew(4, node_size=2)
    yield crew
    crew.stop()


def timeouts(ranks: Ranks, across: str) -> dict[str, float]:
    """Seconds that each group of a sharded model's mesh waits, by the dimension's name."""
    mesh = next(sharded(ranks, 1, across=across).parameters()).device_mesh
    backends = {name: mesh.get_group(name)._get_backend(ranks.device) for name in mesh.mesh_dim_names}
    return {name: backend.options._timeout.total_seconds() for name, backend in backends.items()}


@pytest.mark.slow
@pytest.mark.parametrize("across, names", [("all", ["shard"]), ("node", ["replicate", "shard"])])
def test_a_group_of_the_mesh_has_another_timeout_than_the_run(four, across, names):
    assert four(timeouts, across) == [dict.fromkeys(names, 60.0)] * 4, "as the crew started them"


@pytest.mark.slow
@pytest.mark.parametrize("across", ["all", "node"])
@pytest.mark.parametrize("assignment", ["four", "one rank has nothing"])
def test_gradient_on_four_ranks(four, assignment, across, record_property):
    """`node`: two machines of two ranks each, which hold copies of each other's shards."""
    check_gradient(four, record_property, f"{assignment}, {across}", assignment, {"kl": 0.3}, {}, False, across)


@needs_restart
@pytest.mark.slow
def test_out_of_memory_with_hybrid_shards(four, record_property):
    alone, _ = on_one(gradient, "four", {"kl": 0.3})
    for place, failing, n in [("forward", 3, 1), ("backward", 0, 1)]:
        for kept, _ in four(gradient_after_running_out, place, failing, n, 120, "four"):
            assert max(relative(found, alone) for found in kept) < 1e-5


@pytest.mark.slow
def test_loading_with_hybrid_shards(four, tmp_path):
    model = tiny_model(3)
    save(model, tmp_path)
    (main, *_), *others = four(loaded, str(tmp_path))
    assert all(torch.equal(main[name], value) for name, value in model.state_dict().items())
    assert all(local < 0.6 * sum(p.numel() for p in model.parameters()) for _, local in others)


# ---- train.py


def train(size: int, out: Path, folder: Path, *options: str, script: str = "train.py") -> list[subprocess.Popen]:
    """train.py in `size` processes, as torchrun starts them, or in one, as a shell does."""
    line = [
        sys.executable,
        script,
        "--recipe",
        "toy",
        "--toy",
        "basic",
        "--model",
        folder,
        "--out",
        out,
        "--steps",
        4,
        "--eval-size",
        2,
    ]
    line += ["--questions", 6, "--mini-batch", 3, "--group-size", 4, *options]
    port = free_port()
    places = [environment(rank, size, port) if size > 1 else {} for rank in range(size)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    base = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    return [subprocess.Popen([str(part) for part in line], env=base | place, **pipes) for place in places]


def read(out: Path) -> tuple[list[dict], list[dict]]:
    """Metrics and rollouts without what a clock says."""
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rollouts = [json.loads(line) for f in sorted((out / "rollouts").iterdir()) for line in f.read_text().splitlines()]
    for line in metrics:
        line.pop("seconds", None)
    for turn in (turn for rollout in rollouts for turn in rollout["turns"]):
        turn.get("observation", {}).pop("seconds", None)
        turn["pieces"] = [piece[:2] for piece in turn.get("pieces", ())]  # probabilities are equal but for rounding
    return metrics, rollouts


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory) -> Path:
    """Four steps of two ranks, uninterrupted."""
    out = tmp_path_factory.mktemp("two") / "whole"
    said = [(process.communicate(timeout=100), process.returncode) for process in train(2, out, folder)]
    assert [status for _, status in said] == [0, 0], said
    assert not said[1][0][0], "only the main rank prints"
    return out


@pytest.mark.slow
def test_train_on_two_ranks_does_what_one_process_does(folder, tmp_path, whole):
    (alone,) = train(1, tmp_path / "alone", folder)
    assert alone.wait(100) == 0, alone.stderr.read()
    (metrics, rollouts), (metrics_2, rollouts_2) = read(tmp_path / "alone"), read(whole)
    assert any(line.get("grad_norm") for line in metrics), "somebody should have learnt something"
    for one, two in zip(metrics, metrics_2, strict=True):
        numbers = {key for key, value in one.items() if isinstance(value, float)}
        assert [two[key] for key in numbers] == pytest.approx([one[key] for key in numbers], rel=1e-3, abs=1e-5)
        assert {k: two[k] for k in two.keys() - numbers} == {k: one[k] for k in one.keys() - numbers}
    assert [r["turns"] for r in rollouts_2] == [r["turns"] for r in rollouts] and len(rollouts) == 96
    assert [(r["group"], r["sample"]) for r in rollouts_2] == [(r["group"], r["sample"]) for r in rollouts]
    weights = [load(out / "model").state_dict() for out in (tmp_path / "alone", whole)]
    assert max((weights[0][name] - weights[1][name]).abs().max().item() for name in weights[0]) < 1e-4


BROKEN = """
import os, sys, train
from mmsr import rollout, update
from mmsr.system import errors

def broken(self, *args, **kwargs):
    if os.environ["RANK"] == "1":
        raise {error}
    return whole(self, *args, **kwargs)

whole, {place} = {place}, broken
train.main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "place, error, status",
    [
        ("rollout.Rollout.__call__", "errors.UserError('row 7 is broken; mend it')", 2),
        ("update.Trainer.forward_backward", "ValueError('a bug')", 1),
    ],
)
def test_exception_on_one_rank_ends_all_and_is_told_once(folder, tmp_path, place, error, status):
    (tmp_path / "broken.py").write_text(BROKEN.format(place=place, error=error))
    begun = time.monotonic()
    processes = train(2, tmp_path / "out", folder, script=tmp_path / "broken.py")
    said = [process.communicate(timeout=60)[1] for process in processes]
    assert time.monotonic() - begun < 40
    assert processes[1].returncode == status and processes[0].returncode in (1, 2)
    message = "row 7 is broken" if status == 2 else "a bug"
    assert "rank 1 of 2" in said[1] and message in said[1] and message not in said[0]
    assert said[1].count("Traceback") == (status == 1) and "Traceback" not in said[0], said[0]


@pytest.mark.slow
def test_two_ranks_stop_together_on_a_signal_and_resume_to_the_same_bits(folder, tmp_path, whole):
    """One rank alone gets the signal, as from a person with `kill`; the other learns of it where they meet."""
    out, resume = tmp_path / "out", []
    for step, which, status in [(1, 1, signal.SIGTERM), (2, 0, signal.SIGINT)]:
        cut = train(2, out, folder, *resume)
        while not (out / f"rollouts/step-{step:06d}.jsonl").is_file() and cut[0].poll() is None:
            time.sleep(0.05)
        cut[which].send_signal(status)
        said = [process.communicate(timeout=100) for process in cut]
        assert [process.returncode for process in cut] == [128 + status] * 2, said
        assert "Go on with --resume" in said[0][0] and not said[1][0]
        resume = ["--resume"]
    again = train(2, out, folder, *resume)
    said = [process.communicate(timeout=100) for process in again]
    assert [process.returncode for process in again] == [0, 0], said
    assert "Resumed after step" in said[0][0]
    assert (out / "model/model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes()
    assert read(out) == read(whole)


def resampled_run(ranks: Ranks, folder: str, out: str, *more: str) -> None:
    """Two steps of train.py with dynamic sampling. Of half of the questions every answer is right."""

    def answer_score(episode: Episode, rule) -> float:
        return float(episode.sample % 2 or zlib.crc32(episode.example.image) % 2)

    given = ["--recipe", "toy", "--toy", "basic", "--model", folder, "--out", out, "--steps", "2", "--eval-size", "2"]
    given += ["--questions", "6", "--mini-batch", "3", "--group-size", "4", "--save-every", "1", "--resample", "2"]
    given += ["--loss", "gspo", "--advantage", "batch", "--penalty", "0", *more]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reward, "answer_score", answer_score)
        patch.setattr(reward, "format_score", lambda episode, rule, well_formed: 0.0)
        train_program.train(parse(given), ranks)


@pytest.mark.slow
def test_dynamic_sampling_on_two_ranks_is_another_or_resumes_to_other_bits(pair, folder, tmp_path):
    alone, whole, again = (tmp_path / name for name in ("alone", "whole", "again"))
    on_one(resampled_run, str(folder), str(alone))
    pair(resampled_run, str(folder), str(whole))
    (metrics, rollouts), (metrics_2, rollouts_2) = read(alone), read(whole)
    for one, two in zip(metrics, metrics_2, strict=True):
        numbers = {key for key, value in one.items() if isinstance(value, float)}
        assert [two[key] for key in numbers] == pytest.approx([one[key] for key in numbers], rel=1e-3, abs=1e-5)
        assert {k: two[k] for k in two.keys() - numbers} == {k: one[k] for k in one.keys() - numbers}
    assert [r["turns"] for r in rollouts_2] == [r["turns"] for r in rollouts]
    steps = [line for line in metrics if "resampled" in line]
    assert all(line["resampled"]["replaced"] > 0 for line in steps)
    assert any(line["zero_std_groups"] < line["resampled"]["zero_std_first"] for line in steps)
    shutil.copytree(whole, again)
    shutil.rmtree(again / "checkpoints" / "step-000002")
    pair(resampled_run, str(folder), str(again), "--resume")
    assert read(again) == read(whole)
    assert (again / "model/model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes()


def adapter_run(ranks: Ranks, folder: str, out: str, *more: str) -> None:
    """Two steps of train.py with adapters. The odd samples of a group are right."""
    given = ["--recipe", "toy", "--toy", "basic", "--model", folder, "--out", out, "--steps", "2", "--eval-size", "2"]
    given += ["--questions", "6", "--mini-batch", "3", "--group-size", "4", "--lora", "8", "--save-every", "1", *more]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reward, "answer_score", lambda episode, rule: float(episode.sample % 2))
        train_program.train(parse(given), ranks)


@pytest.mark.slow
@pytest.mark.parametrize("across", FORMS)
def test_a_run_with_adapters_on_two_ranks_is_another_or_resumes_to_other_bits(pair, folder, tmp_path, across):
    names = ("alone", "whole", "again")
    alone, whole, again = (tmp_path / name for name in names)
    on_one(adapter_run, str(folder), str(alone))
    pair(adapter_run, str(folder), str(whole), "--shard", across)
    (metrics, rollouts), (metrics_2, rollouts_2) = read(alone), read(whole)
    for one, two in zip(metrics, metrics_2, strict=True):
        numbers = {key for key, value in one.items() if isinstance(value, float)}
        assert [two[key] for key in numbers] == pytest.approx([one[key] for key in numbers], rel=1e-3, abs=1e-5)
        assert {k: two[k] for k in two.keys() - numbers} == {k: one[k] for k in one.keys() - numbers}
    assert [r["turns"] for r in rollouts_2] == [r["turns"] for r in rollouts] and len(rollouts) == 48
    adapters = [load_file(out / "adapter" / "adapter_model.safetensors") for out in (alone, whole)]
    assert max((adapters[0][name] - adapters[1][name]).abs().max().item() for name in adapters[0]) < 1e-4
    assert any(tensor.any() for name, tensor in adapters[1].items() if "lora_B" in name)
    shutil.copytree(whole, again)
    shutil.rmtree(again / "checkpoints" / "step-000002")
    pair(adapter_run, str(folder), str(again), "--shard", across, "--resume")
    assert read(again) == read(whole)
    resumed = load_file(again / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(resumed[name], adapters[1][name]) for name in resumed)


def opened_with_adapters(ranks: Ranks, folder: str, across: str):
    """The types of what is frozen and trained, bytes of the frozen weights here, and the adapters' values."""
    config = Config(model=folder, lora=4, shard=across, dtype="bfloat16")
    model = open_model(config, Path(folder), torch.bfloat16, ranks)
    kept = [p for p in model.parameters() if not p.requires_grad]
    adapters = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    local = sum(getattr(p, "to_local", lambda p=p: p)().nbytes for p in kept)
    weights = full_state_dict(model, ranks, torch.bfloat16)  # of the main rank
    if across == "none":
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return {p.dtype for p in kept}, {p.dtype for p in adapters.values()}, local, adapters, weights


@pytest.mark.parametrize("across", FORMS)
def test_frozen_weights_are_kept_in_fp32_or_adapters_begin_apart(pair, across, tmp_path):
    model = tiny_model(3).bfloat16()
    save(model, tmp_path)
    whole = sum(p.nbytes for p in model.parameters())
    alone = on_one(opened_with_adapters, str(tmp_path), across)
    for kept_as, trained, local, adapters, weights in [alone, *pair(opened_with_adapters, str(tmp_path), across)]:
        assert kept_as == {torch.bfloat16} and trained == {torch.float32}
        assert adapters.keys() == alone[3].keys() and all(lora.is_adapter(name) for name in adapters)
        assert all(torch.equal(adapters[name], alone[3][name]) for name in adapters)
        assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items() if weights)
        assert local == whole or across == "node" and local < 0.6 * whole


def test_without_proc_another_process_with_a_ranks_id_is_killed(monkeypatch):
    """macOS has no /proc: whether the rank still runs, or a later process has its id, cannot be told."""
    killed = []
    monkeypatch.setattr(Path, "read_text", lambda path: Path("/absent/stat").open())
    monkeypatch.setattr(parallel, "_lost_another_rank", lambda error: True)
    monkeypatch.setattr(parallel.os, "kill", lambda *given: killed.append(given))
    monkeypatch.setattr(parallel.os, "_exit", sys.exit)
    monkeypatch.setattr(parallel.time, "sleep", lambda seconds: None)
    with pytest.raises(SystemExit):
        parallel._report_and_exit(Ranks(), OtherRankFailed("lost", 1), [parallel._identity(os.getppid())])
    assert not killed
