"""The disk plan against the files of a run."""

from pathlib import Path

import pytest

import train
from mmsr import disk
from mmsr.config import parse
from mmsr.pretrained.config_json import read_config
from mmsr.pretrained.load import load
from mmsr.report import album, output
from mmsr.system import checkpoint
from mmsr.system.optimizer import MasterWeights

SMALL = (
    "--recipe toy --toy basic --data toy --search toy --steps 3 --save-every 1 --questions 4 --mini-batch 4 "
    "--group-size 4 --eval-size 1 --dtype bfloat16 --model"
).split()


def used(place: Path) -> int:
    """Bytes of a file, or of the files of a folder."""
    if place.is_file():
        return place.stat().st_size
    return sum(used(inside) for inside in place.iterdir())


def test_a_run_writes_more_or_much_less_than_the_disk_plan_says(folder, tmp_path, monkeypatch):
    """Checkpoints at their fullest: two are kept, and the third is written before the first is removed."""
    fullest = []
    remove = checkpoint._remove_older

    def look_and_remove(newest, keep, ranks):
        fullest.append(used(newest.parent))
        remove(newest, keep, ranks)

    monkeypatch.setattr(checkpoint, "_remove_older", look_and_remove)
    out = tmp_path / "out"
    argv = [*SMALL, str(folder), "--out", str(out)]
    train.main(argv)
    planned = disk.disk_needed(parse(argv), read_config(folder))
    assert planned.keys() == {"checkpoints", "model", "rollouts", "pictures", "report"}
    assert 0.95 * planned["checkpoints"] < max(fullest) <= planned["checkpoints"]
    assert planned["model"] - disk.TOKENIZER < 1.1 * used(out / "model") and used(out / "model") <= planned["model"]
    assert planned["rollouts"] / 6 < used(out / "rollouts") <= planned["rollouts"]
    assert used(out / "images") <= planned["pictures"] and used(out / "report.html") <= planned["report"]


def test_a_save_in_fp32_has_other_bytes_than_planned(folder, tmp_path):
    model = load(folder)
    optimizer = MasterWeights(model)
    optimizer.make_state()
    checkpoint.save(tmp_path, 1, model, optimizer, {"step": 1}, keep=2)
    planned = disk.save_bytes(model.config, item=4)
    assert 0.95 * planned < used(tmp_path) <= planned


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
