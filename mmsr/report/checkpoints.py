"""When a run saves what, and where it goes on."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from mmsr.assemble import Setup
from mmsr.data.sampler import Sampler
from mmsr.report.output import Output
from mmsr.system import checkpoint
from mmsr.update import Trainer


class Checkpoints:
    """When a run saves what: every --save-every steps, after the last, and when it is interrupted."""

    def __init__(self, setup: Setup, trainer: Trainer, sampler: Sampler, out: Output):
        self.setup, self.config, self.sampler, self.optimizer = setup, setup.config, sampler, trainer.optimizer
        self.out = out
        self.root = Path(self.config.out) / "checkpoints"
        self.done = self.saved = 0  # the last step that is finished; that is saved
        self.cursor = 0  # of the sampler when that step was finished
        self.ranks = ranks = setup.ranks
        device = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else ranks.device.type
        self.versions = dict(torch=torch.__version__, device=device, dtype=str(setup.dtype), processes=ranks.size)

    def resume(self) -> int:
        """Take up the newest sound checkpoint if that is asked for. Returns the number of finished steps."""
        if not self.config.resume:
            return 0
        state = checkpoint.resume(self.root, self.setup.model, self.optimizer, self.ranks)
        if state is None:
            self.ranks.print(f"--resume: no checkpoint in {self.root}: starting afresh.")
            return 0
        self.done = self.saved = state["step"]
        self.cursor = self.sampler.cursor = state["cursor"]
        self.ranks.print(f"Resumed after step {self.done}.")
        changed = {key: old for key, old in state["versions"].items() if self.versions.get(key) != old}
        if changed:
            listed = ", ".join(f"{key} {old}, now {self.versions.get(key)}" for key, old in changed.items())
            self.ranks.print(f"Saved with {listed}: weights and data order are exact, what is sampled may differ.")
        return self.done

    def finished(self, step: int) -> None:
        self.done, self.cursor = step, self.sampler.cursor
        if step == self.config.steps or self.config.save_every and step % self.config.save_every == 0:
            self.save()

    def save(self) -> None:
        self.out.check_there()
        if self.saved == self.done:
            return
        config = dataclasses.asdict(self.config)
        state = {"step": self.done, "cursor": self.cursor, "config": config, "versions": self.versions}
        checkpoint.save(self.root, self.done, self.setup.model, self.optimizer, state, self.config.keep, self.ranks)
        self.saved = self.done

    def leave(self) -> None:
        """Give up what has not begun, save and say so, before the program ends early."""
        self.setup.drop()
        self.save()
        kept = f"finished steps: {self.done}, saved in {self.root}" if self.done else "no step was finished"
        self.ranks.print(f"Interrupted; {kept}. Go on with --resume.")
