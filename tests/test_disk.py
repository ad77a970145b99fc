"""The disk plan against the files of saves; test_train.py has it against those of a run."""

from pathlib import Path

import pytest
import torch
from helpers import tiny_model
from test_plan import adapted

from mmsr import disk, lora
from mmsr.config import parse
from mmsr.pretrained.published import SIZES
from mmsr.report import album, output
from mmsr.system import checkpoint
from mmsr.system.optimizer import MasterWeights


def used(place: Path) -> int:
    """Bytes of a file, or of the files of a folder."""
    if place.is_file():
        return place.stat().st_size
    return sum(used(inside) for inside in place.iterdir())


@pytest.mark.first_is_quick
@pytest.mark.parametrize("given", ["", "--lora 8", "--freeze vision embedding"])
@pytest.mark.parametrize("dtype, item", [(torch.float32, 4), (torch.bfloat16, 2)])
def test_saves_take_more_or_much_less_than_planned_at_their_fullest(tmp_path, monkeypatch, dtype, item, given):
    """Two are kept, and the third is written before the first is removed."""
    fullest = []
    remove = checkpoint._remove_older

    def look_and_remove(newest, keep, ranks):
        fullest.append(used(newest.parent))
        remove(newest, keep, ranks)

    monkeypatch.setattr(checkpoint, "_remove_older", look_and_remove)
    config = parse(f"--recipe blog --model x --steps 3 --save-every 1 {given}".split())
    model, adapters = adapted(tiny_model(0, vocab_size=8000).to(dtype), config)
    for name, (a, b) in adapters.items():
        lora.add_adapter(model.get_submodule(name), a, b, 1.0)
    optimizer = MasterWeights(model)
    optimizer.make_state()
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, model, optimizer, {"step": step}, keep=2)
    planned = disk.disk_needed(config, model.config, 1, item)["checkpoints"]
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    headers = 3 * 5 * disk.HEADER * len(weights)  # a bound, and large beside few numbers
    assert 0.9 * (planned - headers) < max(fullest) <= planned


def test_whole_weights_are_planned_for_a_run_that_writes_adapters():
    model = SIZES["Qwen2.5-VL-7B"]
    lines = ("--model x", "--model x --lora 64", "--model x --lora 64 --merge")
    parts = [disk.disk_needed(parse(line.split()), model, 8) for line in lines]
    numbers = 161_480_704
    assert parts[0]["adapter"] == 0 and 4 * numbers < parts[1]["adapter"] < 4.01 * numbers
    assert parts[1]["model"] == 0 and parts[2]["model"] == parts[0]["model"] > 16e9
    assert 12 * numbers * 3 < parts[1]["checkpoints"] < 12.2 * numbers * 3


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
