"""Trackers: the numbers of metrics.jsonl sent to TensorBoard or Weights & Biases, where a run asks for it (`--track`).

A step's numbers are named train/reward, train/seconds/rollout, …; an evaluation's eval/familiar/accuracy, … . No run
needs a tracker: its package is imported only here, and a tracker that fails later costs one warning.

A resumed run continues the same run of Weights & Biases, whose id is in OUT/wandb-id (WANDB_RUN_ID wins). Of steps that
it repeats, the first numbers stay: Weights & Biases drops a step that is not after the last.
"""

from __future__ import annotations

import importlib
import os
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mmsr.system.errors import UserError
from mmsr.system.files import write_whole

MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}
WANDB_ID = "wandb-id"


class Tracker:
    """After `start`, call it with every line of metrics.jsonl. Of the kind "" it does nothing."""

    def __init__(self, kind: str):
        """Raises UserError where the tracker's package is missing."""
        self.kind = kind
        self.warned = False
        self.send: Callable[[dict, int], Any] | None = None  # of (values by name, step)
        self.module: Any = None
        if not kind:
            return
        try:
            self.module = importlib.import_module(MODULES[kind])
        except ImportError as error:
            raise UserError(f"--track {kind}: {error}; pip install {kind}, or leave --track out") from None

    def start(self, folder: Path, config: Mapping[str, Any], done: int) -> None:
        """`done`: the steps that a resumed run has finished. Raises UserError where the tracker does not start."""
        try:
            if self.kind == "tensorboard":
                self._start_tensorboard(folder, done)
            elif self.kind == "wandb":
                self._start_wandb(folder, config)
        except UserError:
            raise
        except Exception as error:  # not logged in, no network: whatever the package raises
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise UserError(f"--track {self.kind} does not start ({reason}); mend that, or leave --track out") from None

    def _start_tensorboard(self, folder: Path, done: int) -> None:
        writer = self.module.SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)

        def send(values: dict, step: int) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)

        self.send = send

    def _start_wandb(self, folder: Path, config: Mapping[str, Any]) -> None:
        file = folder / WANDB_ID
        kept = file.read_text(encoding="utf-8").strip() if file.is_file() else ""
        chosen = os.environ.get("WANDB_RUN_ID") or kept or secrets.token_hex(8)
        run = self.module.init(project="mmsr", name=folder.name, config=dict(config), id=chosen, resume="allow")
        if chosen != kept:  # only after `init`: a folder in which nothing has started stays empty
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(file, [chosen.encode() + b"\n"])
        self.send = lambda values, step: run.log(values, step=step)

    def __call__(self, record: Mapping[str, Any]) -> None:
        """Send a line of metrics.jsonl. A tracker that fails never ends the run."""
        if self.send is None:
            return
        prefix = "" if "eval" in record else "train/"
        values = {prefix + name: value for name, value in _flat(record) if name != "step"}
        try:
            self.send(values, record["step"])
        except Exception as error:
            if not self.warned:
                print(f"\n--track {self.kind}: {error}; the run goes on, metrics.jsonl has it all", file=sys.stderr)
            self.warned = True


def _flat(record: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a record by name; those of records inside it are named outer/inner."""
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{path}{name}/")
        elif isinstance(value, (int, float)):  # not the list of alarms
            yield path + name, value
