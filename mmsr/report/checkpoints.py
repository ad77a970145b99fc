"""When a run saves what, and where it continues."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from mmsr.assemble import Setup
from mmsr.config import Config
from mmsr.data.sampler import Sampler
from mmsr.report.output import Output
from mmsr.system import checkpoint
from mmsr.update import Trainer


class Checkpoints:
    """Saves a run every --save-every steps, after the last, and when it is interrupted or its judge fails for good."""

    def __init__(self, setup: Setup[Config], trainer: Trainer, sampler: Sampler, output: Output):
        self.setup = setup
        self.config = setup.config
        self.ranks = setup.ranks
        self.sampler = sampler
        self.optimizer = trainer.optimizer
        self.output = output
        self.root = Path(self.config.out) / "checkpoints"
        self.done = 0  # the last step that is finished
        self.saved = 0  # the last step that is saved
        self.cursor = 0  # of the sampler when step `done` was finished
        device = self.ranks.device
        self.versions = {
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "dtype": str(setup.dtype),
            "processes": self.ranks.size,
        }

    def resume(self) -> int:
        """Load the newest sound checkpoint if that is asked for. Returns the number of finished steps."""
        if not self.config.resume:
            return 0
        self.ranks.print(f"Looking for a checkpoint in {self.root}.")
        state = checkpoint.resume(self.root, self.setup.model, self.optimizer, self.ranks)
        if state is None:
            self.ranks.print(f"--resume: no checkpoint in {self.root}: starting afresh.")
            return 0
        self.done = state["step"]
        self.saved = state["step"]
        self.cursor = state["cursor"]
        self.sampler.cursor = state["cursor"]
        self.ranks.print(f"Resumed after step {self.done}.")
        changed = []
        for name, old in state["versions"].items():
            new = self.versions.get(name)
            if new != old:
                changed.append(f"{name} {old}, now {new}")
        if changed:
            listed = ", ".join(changed)
            self.ranks.print(f"Saved with {listed}: weights and data order are exact, what is sampled may differ.")
        return self.done

    def finished(self, step: int) -> None:
        """Note that a step is finished, and save if it is time."""
        self.done = step
        self.cursor = self.sampler.cursor
        is_last = step == self.config.steps
        is_due = self.config.save_every and step % self.config.save_every == 0
        if is_last or is_due:
            self.save()

    def save(self) -> None:
        """Save the last finished step, unless it is saved already."""
        self.output.check_there()
        if self.saved == self.done:
            return
        self.ranks.print(f"Saving step {self.done} in {self.root}.")
        state = {
            "step": self.done,
            "cursor": self.cursor,
            "config": dataclasses.asdict(self.config),
            "versions": self.versions,
        }
        checkpoint.save(self.root, self.done, self.setup.model, self.optimizer, state, self.config.keep, self.ranks)
        self.saved = self.done

    def leave(self) -> None:
        """Save before an interrupted program ends, and give up what its tools have not started."""
        self.setup.drop()
        self.save()
        kept = f" after step {self.done}, saved in {self.root}" if self.done else "; no step was finished"
        self.ranks.print(f"Interrupted{kept}. Go on with --resume.")
