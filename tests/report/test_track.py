"""Trackers, played by modules that only note what they are sent."""

import importlib
import sys
from types import ModuleType, SimpleNamespace

import pytest

from mmsr.report import track
from mmsr.report.track import Tracker
from mmsr.system.errors import UserError

LINE = {"step": 3, "reward": 0.5, "kl": None, "seconds": {"rollout": 1.5}, "alarms": ["tools"]}
EVALUATION = {"step": 3, "eval": {"familiar": {"n": 2, "accuracy": 1.0}}}
NAMED = [
    ({"train/reward": 0.5, "train/seconds/rollout": 1.5}, 3),
    ({"eval/familiar/n": 2, "eval/familiar/accuracy": 1.0}, 3),
]


def fake(monkeypatch, name, **contents):
    module = ModuleType(name)
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name, module)


def test_wandb_gets_names_that_people_know(monkeypatch, tmp_path):
    begun, sent = [], []
    run = SimpleNamespace(log=lambda values, step: sent.append((values, step)))
    fake(monkeypatch, "wandb", init=lambda **given: begun.append(given) or run)
    tracker = Tracker("wandb")
    tracker.start(tmp_path / "mine", {"lr": 1.0}, 0)
    tracker(LINE), tracker(EVALUATION)
    (given,) = begun
    assert given | {"id": 0} == {"project": "mmsr", "name": "mine", "config": {"lr": 1.0}, "id": 0, "resume": "allow"}
    assert sent == NAMED


def test_resumed_run_opens_a_new_one_in_wandb(monkeypatch, tmp_path):
    begun = []
    fake(monkeypatch, "wandb", init=lambda **given: begun.append(given["id"]))
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    for folder, done in ((tmp_path / "one", 0), (tmp_path / "one", 40), (tmp_path / "other", 0)):
        Tracker("wandb").start(folder, {}, done)
    assert begun[0] == begun[1] != begun[2] and begun[0]
    monkeypatch.setenv("WANDB_RUN_ID", "chosen")
    Tracker("wandb").start(tmp_path / "one", {}, 50)
    assert begun[3] == "chosen"


def test_tensorboard_forgets_the_steps_that_a_resumed_run_repeats(monkeypatch, tmp_path):
    begun, sent = [], []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            begun.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            sent.append((name, value, step))

    fake(monkeypatch, "torch.utils.tensorboard", SummaryWriter=SummaryWriter)
    tracker = Tracker("tensorboard")
    tracker.start(tmp_path, {}, 40)
    tracker(LINE)
    assert begun == [(str(tmp_path / "tensorboard"), 41)]
    assert sent == [("train/reward", 0.5, 3), ("train/seconds/rollout", 1.5, 3)]


@pytest.mark.parametrize("kind", track.MODULES)
def test_missing_package_is_one_line_that_names_it(monkeypatch, kind):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(UserError, match=f"^--track {kind}: No module .*; pip install {kind}, or leave --track out$"):
        Tracker(kind)


def test_tracker_that_does_not_start_is_the_users_to_mend(monkeypatch, tmp_path):
    def init(**given):
        raise RuntimeError("not logged in\nat all")

    fake(monkeypatch, "wandb", init=init)
    with pytest.raises(UserError, match=r"^--track wandb does not start \(RuntimeError: not logged in at all\)"):
        Tracker("wandb").start(tmp_path, {}, 0)
    assert not list(tmp_path.iterdir()), "a folder in use would be refused the next time"


def test_tracker_that_fails_later_warns_once_and_ends_nothing(monkeypatch, tmp_path, capsys):
    tried = []

    def log(values, step):
        tried.append(step)
        raise OSError("gone")

    fake(monkeypatch, "wandb", init=lambda **given: SimpleNamespace(log=log))
    tracker = Tracker("wandb")
    tracker.start(tmp_path, {}, 0)
    tracker(LINE), tracker(EVALUATION)
    assert len(tried) == 2 and capsys.readouterr().err.count("gone") == 1


def test_no_tracker_is_needed(tmp_path):
    tracker = Tracker("")
    tracker.start(tmp_path, {}, 0)
    tracker(LINE)
    assert not list(tmp_path.iterdir())
