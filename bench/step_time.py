"""Seconds of a training step on real devices, computed from sizes and from the rates of a card.

    python bench/step_time.py                # the table of docs/scale.md
    python bench/step_time.py --shares       # SHARES again, from bench/roofline.py: half a minute

The formulas are those of docs/scale.md, under "Time and traffic". The rates are assumptions: about nine tenths of a
card's bandwidth and seven tenths of its peak on the data sheet. What the program's own passes reach of these rates is
counted by bench/roofline.py, with every kernel at the rate of the card. So a real step takes longer.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import NamedTuple, Sequence

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mmsr.config import RECIPES, Config  # noqa: E402
from mmsr.plan import GIB, PUBLISHED, kept_as_fits, sizes  # noqa: E402

NODE = 8  # devices of a machine
PROMPT, GENERATED, OBSERVED = 1000, 250, 400  # tokens of a rollout: prompt with picture, sampled, found
EMPTYING = 0.8  # of GENERATED: decode steps that empty the slots when no conversation waits any more
ARRIVES = 0.75  # of the rate of a link
INFINIBAND = 50e9  # bytes a second of each device, between machines


@dataclass(frozen=True)
class Device:
    """Rates of a card per second, and its memory."""

    name: str
    gigabytes: int  # in its name
    gib: float  # that it reports, at least
    bandwidth: float  # bytes
    peak: float  # operations of bf16 products
    link: float  # bytes to the other devices of its machine


DEVICES = [
    Device("RTX 4090", 24, 23.5, 0.9e12, 117e12, 25e9),  # PCIe 4
    Device("L40S", 48, 44, 0.78e12, 256e12, 25e9),
    Device("H100", 80, 79, 3.0e12, 700e12, 450e9),  # NVLink
    Device("H200", 141, 139, 4.3e12, 700e12, 450e9),
]
H100 = DEVICES[2]


class Shares(NamedTuple):
    """What passes reach of a card's rate: of the bandwidth in decoding, else of the peak."""

    decode: float
    forward: float
    kept: float  # training, with every block kept
    recomputed: float  # training, with every block recomputed

    def training(self, kept: float) -> float:
        """With this share of the blocks kept: the seconds of both kinds add up."""
        return 1 / (kept / self.kept + (1 - kept) / self.recomputed)


SHARES = {
    ("RTX 4090", "Qwen2.5-VL-3B"): Shares(0.78, 0.89, 0.87, 0.71),
    ("L40S", "Qwen2.5-VL-3B"): Shares(0.78, 0.76, 0.74, 0.60),
    ("H100", "Qwen2.5-VL-3B"): Shares(0.68, 0.82, 0.79, 0.65),
    ("H200", "Qwen2.5-VL-3B"): Shares(0.63, 0.87, 0.84, 0.69),
    ("RTX 4090", "Qwen2.5-VL-7B"): Shares(0.86, 0.93, 0.92, 0.75),
    ("L40S", "Qwen2.5-VL-7B"): Shares(0.86, 0.85, 0.83, 0.68),
    ("H100", "Qwen2.5-VL-7B"): Shares(0.83, 0.89, 0.87, 0.71),
    ("H200", "Qwen2.5-VL-7B"): Shares(0.80, 0.92, 0.90, 0.73),
}


def recipe(name: str) -> Config:
    return Config(**{**RECIPES[name], "recipe": name, "model": "x"})


class Step(NamedTuple):
    """A step on the device with most to do."""

    questions: int
    micro_batches: int
    inside: float  # bytes between the devices of a copy
    between: float  # bytes between copies
    train: float  # seconds, as those below
    prefill: float
    decode: float
    traffic: float

    @property
    def seconds(self) -> float:
        return self.train + self.prefill + self.decode + self.traffic


def step(name: str, config: Config, devices: int, device: Device = H100) -> Step:
    """A step of model `name` by `config` on so many devices, NODE of them to a machine and to a copy of the weights."""
    model, shares = PUBLISHED[name], SHARES[device.name, name]
    weights = sizes(model).count()
    products = weights - sizes(model).count(inside="visual.") - model.vocab_size * model.hidden_size  # no embedding
    token = 4 * model.num_hidden_layers * model.num_key_value_heads * model.head_dim  # bytes of cache
    n = min(devices, NODE)
    copies = ceil(devices / NODE)
    blocks = kept_as_fits(model, config, device.gib * GIB, devices, NODE).keep_blocks if config.recompute else 10**6
    training = shares.training(min(1, blocks / model.num_hidden_layers)) * device.peak
    forward = shares.forward * device.peak

    updates, group = config.questions // config.mini_batch, config.group_size
    mine = updates * ceil(config.questions / (updates * devices))
    tokens = mine * (PROMPT + group * (GENERATED + OBSERVED))
    micro_batches = updates * ceil(tokens / (updates * config.micro_tokens))
    references = (config.kl > 0) + (updates > 1)  # forward passes: of the reference, and of π_old
    train = 6 * products * tokens / training + 2 * references * products * tokens / forward
    prefill = 2 * products * mine * (PROMPT + group * OBSERVED) / forward

    width = min(config.slots, group * mine)
    cache = token * (width / group * PROMPT + width * (GENERATED + OBSERVED) / 2)
    decode_steps = (group * mine / width + EMPTYING) * GENERATED
    decode = decode_steps * (2 * products + cache) / (shares.decode * device.bandwidth)

    inside = (micro_batches * (8 + 2 * references) * weights + 2 * weights) * (n - 1) / n
    between = micro_batches * 2 * (copies - 1) / copies * 4 * weights / n
    traffic = inside / (ARRIVES * device.link) + between / (ARRIVES * INFINIBAND)
    return Step(mine, micro_batches, inside, between, train, prefill, decode, traffic)


def rollouts(config: Config) -> int:
    return config.steps * config.questions * config.group_size


# ---- tables


def scale_table() -> str:
    """7B by the paper's recipe, on 8 to 1,024 devices."""
    config = recipe("paper")
    head = "devices | questions each | micro-batches | GB inside | GB between | training s | prefill s | decoding s"
    lines = [f"| {head} | traffic s | step s | rollouts / s / device |", "|---" * 11 + "|"]
    for devices in [8 * 2**k for k in range(8)]:
        it = step("Qwen2.5-VL-7B", config, devices)
        counts = [devices, it.questions, it.micro_batches, it.inside / 1e9, it.between / 1e9]
        rate = config.questions * config.group_size / it.seconds / devices
        numbers = [*counts, it.train, it.prefill, it.decode, it.traffic, it.seconds, rate]
        lines.append("| " + " | ".join(map(short, numbers)) + " |")
    return "\n".join(lines)


def short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 or value == int(value) else f"{value:.1f}"


def roofline_shares() -> dict[tuple[str, str], Shares]:
    """What SHARES has, counted by bench/roofline.py: a decode batch of 32 × 4, a prefill, a micro-batch trained."""
    import roofline

    found = {}
    for shape, config in roofline.SHAPES.items():
        _, decode, _, forward, kept, _, recomputed, *_ = roofline.passes(config, roofline.Sizes())
        for device in DEVICES:
            card = replace(roofline.CARDS["H100"], bandwidth=device.bandwidth, peak=device.peak)
            reached = [
                one.limit(card) / one.seconds(card, one.launch(card)) for one in (decode, forward, kept, recomputed)
            ]
            found[device.name, f"Qwen2.5-VL-{shape}"] = Shares(*(round(share, 2) for share in reached))
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shares", action="store_true", help="the shares of each card's rates, from roofline.py")
    if parser.parse_args(argv).shares:
        for (device, model), shares in roofline_shares().items():
            print(device, model, *shares)
        return
    print(scale_table())


if __name__ == "__main__":
    main()
