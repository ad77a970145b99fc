"""The disk plan against the files of saves; test_train.py has it against those of a run."""

from pathlib import Path

import pytest
import torch
from helpers import tiny_model

from mmsr import disk
from mmsr.config import parse
from mmsr.report import album, output
from mmsr.system import checkpoint
from mmsr.system.optimizer import MasterWeights


def used(place: Path) -> int:
    """Bytes of a file, or of the files of a folder."""
    if place.is_file():
        return place.stat().st_size
    return sum(used(inside) for inside in place.iterdir())


@pytest.mark.parametrize("dtype, item", [(torch.float32, 4), (torch.bfloat16, 2)])
def test_saves_take_more_or_much_less_than_planned_at_their_fullest(tmp_path, monkeypatch, dtype, item):
    """Two are kept, and the third is written before the first is removed."""
    fullest = []
    remove = checkpoint._remove_older

    def look_and_remove(newest, keep, ranks):
        fullest.append(used(newest.parent))
        remove(newest, keep, ranks)

    monkeypatch.setattr(checkpoint, "_remove_older", look_and_remove)
    model = tiny_model(0, vocab_size=8000).to(dtype)
    optimizer = MasterWeights(model)
    optimizer.make_state()
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, model, optimizer, {"step": step}, keep=2)
    config = parse("--recipe blog --model x --steps 3 --save-every 1".split())
    planned = disk.disk_needed(config, model.config, 1, item)["checkpoints"]
    assert 0.9 * planned < max(fullest) <= planned


def test_the_disk_plan_forgets_a_bound_of_what_is_written():
    assert disk.DETAILED == output.MOST_DETAILED
    assert disk.PICTURES == album.MOST_BYTES


@pytest.mark.parametrize(
    "steps, every, keep, at_once",
    [(100, 10, 2, 3), (2, 1, 2, 2), (2, 10, 2, 1), (15, 10, 2, 2), (50, 0, 2, 1), (100, 5, 4, 5)],
)
def test_more_checkpoints_are_there_at_once_than_planned(steps, every, keep, at_once):
    options = ["--steps", steps, "--save-every", every, "--keep", keep, "--recipe", "blog", "--model", "x"]
    assert disk.saves_at_once(parse(list(map(str, options)))) == at_once
