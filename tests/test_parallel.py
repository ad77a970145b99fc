"""Ranks against a single process: equal gradients and tokens however work is dealt, and nobody left waiting."""

from __future__ import annotations

import pytest
import torch
from crew import Crew, on_one
from helpers import conversation, random_image, report, tiny_model
from test_update import BANNED, EXAMPLE, made, relative

from mmsr.episode import Episode
from mmsr.parallel import Ranks, gathered, shard
from mmsr.update import MasterWeights, Trainer, split


@pytest.fixture(scope="module")
def pair():
    crew = Crew(2)
    yield crew
    crew.stop()


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


# How groups 0 … 4 (3 and 4 without pictures) are dealt: rank of each group.
DEALS = {
    "even": [0, 1, 0, 1, 0],
    "one rank has text only": [0, 0, 0, 1, 1],
    "one rank has nothing": [0, 0, 0, 0, 0],
    "the other has nothing": [1, 1, 1, 1, 1],
    "four": [0, 1, 3, 3, 3],
}


def batch() -> list[Episode]:
    return [*made(), *texts(3), *texts(4)]


def share(ranks: Ranks, deal: str) -> list[Episode]:
    return [e for e in batch() if ranks.size == 1 or DEALS[deal][e.group_id] == ranks.rank]


def sharded(ranks: Ranks, seed: int, dtype=torch.float32, across="node", **changes):
    return shard(tiny_model(seed, **changes), ranks, dtype, across)


def build(ranks: Ranks, options: dict, changes: dict, recompute: bool = False, across="node") -> Trainer:
    model = sharded(ranks, 1, across=across, **changes)
    model.checkpoint_blocks = model.visual.checkpoint_blocks = recompute
    options = {"max_grad_norm": 1e9, "micro_tokens": 60} | options
    if options.get("kl"):
        options["reference"] = sharded(ranks, 2, across=across, **changes).requires_grad_(False)
    optimizer = MasterWeights(model, lambda p: torch.optim.SGD(p, lr=0.1))
    return Trainer(model, optimizer, BANNED, ranks=ranks, **options)


def whole_gradient(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {
        name: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad.clone()
        for name, p in trainer.model.named_parameters()
        if p.grad is not None
    }


def gradient(ranks: Ranks, deal: str, options=None, changes=None, recompute=False, across="node"):
    """Gradient of one update, whole, and the metrics."""
    trainer = build(ranks, options or {}, changes or {}, recompute, across)
    kept = {}
    trainer.optimizer.step = lambda lr: kept.update(whole_gradient(trainer))
    metrics = trainer.step([share(ranks, deal)], 0.1)
    return kept, metrics


def check_gradient(crew, record_property, what: str, *args) -> None:
    alone, metrics = on_one(gradient, *args)
    for found, other in crew(gradient, *args):
        difference = relative(found, alone)
        report(record_property, f"gradient, {what}", difference)
        assert difference < 1e-5
        for key in ("loss", "kl", "entropy", "logp_gap", "logp_gap_max", "grad_norm", "encoded", "trained_unique"):
            assert other[key] == pytest.approx(metrics[key], rel=1e-4, abs=1e-6), key


@pytest.mark.parametrize("deal", [d for d in DEALS if d != "four"])
def test_gradient_does_not_depend_on_how_episodes_are_dealt(pair, deal, record_property):
    check_gradient(pair, record_property, deal, deal, {"kl": 0.3})


def test_gradient_of_tied_head_token_mean_and_recomputed_blocks(pair, record_property):
    changes = {"tie_word_embeddings": True}
    check_gradient(pair, record_property, "tied", "even", {"loss_norm": "token"}, changes, True)
