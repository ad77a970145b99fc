"""Seconds of a training step on real devices, computed from sizes and from the rates of a card.

    python bench/step_time.py                # the table of docs/scale.md
    python bench/step_time.py --lora         # the table of docs/performance.md: by LoRA beside full fine-tuning
    python bench/step_time.py --shares       # SHARES and LORA_SHARES again, from bench/roofline.py: a minute

The formulas are those of docs/scale.md, under "Time and traffic", and of docs/performance.md for LoRA. The rates are
assumptions: about nine tenths of a card's bandwidth and seven tenths of its peak on the data sheet. What the program's
own passes reach of these rates is counted by bench/roofline.py, with every kernel at the rate of the card. So a real
step takes longer.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple, Sequence

from gpu_day import LORA

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mmsr.config import RECIPES, Config  # noqa: E402
from mmsr.plan import GIB, USABLE, kept_as_fits, plan  # noqa: E402
from mmsr.pretrained.published import SIZES  # noqa: E402
from mmsr.shapes import sizes, trained  # noqa: E402

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


MODELS = ("Qwen2.5-VL-3B", "Qwen2.5-VL-7B")
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


# With adapters of rank LORA on the decoder. Of what is needed: no gradient of a frozen weight is.
LORA_SHARES = {
    ("RTX 4090", "Qwen2.5-VL-3B"): Shares(0.73, 0.89, 0.77, 0.59),
    ("L40S", "Qwen2.5-VL-3B"): Shares(0.73, 0.72, 0.55, 0.43),
    ("H100", "Qwen2.5-VL-3B"): Shares(0.62, 0.79, 0.63, 0.48),
    ("H200", "Qwen2.5-VL-3B"): Shares(0.57, 0.86, 0.70, 0.54),
    ("RTX 4090", "Qwen2.5-VL-7B"): Shares(0.82, 0.93, 0.85, 0.64),
    ("L40S", "Qwen2.5-VL-7B"): Shares(0.83, 0.81, 0.68, 0.52),
    ("H100", "Qwen2.5-VL-7B"): Shares(0.78, 0.86, 0.74, 0.57),
    ("H200", "Qwen2.5-VL-7B"): Shares(0.75, 0.91, 0.81, 0.61),
}


def recipe(name: str, **changes: Any) -> Config:
    return Config(**{**RECIPES[name], "recipe": name, "model": "x", **changes})


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
    """A step of model `name` by `config` on so many devices, NODE of them to a machine and to a copy of the weights.

    With --lora it trains adapters, and each device holds all weights, unless --shard says otherwise.
    """
    lora = trained(SIZES[name], config).numbers()
    whole = lora and config.shard in ("auto", "none")  # on every device
    model, shares = SIZES[name], (LORA_SHARES if lora else SHARES)[device.name, name]
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
    operations = 4 * products + 6 * lora if lora else 6 * products  # of a token
    train = operations * tokens / training + 2 * references * (products + lora) * tokens / forward
    prefill = 2 * (products + lora) * mine * (PROMPT + group * OBSERVED) / forward

    width = min(config.slots, group * mine)
    cache = token * (width / group * PROMPT + width * (GENERATED + OBSERVED) / 2)
    decode_steps = (group * mine / width + EMPTYING) * GENERATED
    decode = decode_steps * (2 * (products + lora) + cache) / (shares.decode * device.bandwidth)

    gathers = 0 if whole else micro_batches * (4 + 2 * references) + 2  # bytes a weight: twice a pass, once to generate
    summed = updates * 4 * lora if lora else micro_batches * 4 * weights  # bytes of gradients
    inside = (gathers * weights + (2 if lora else 1) * summed) * (n - 1) / n
    between = 2 * (copies - 1) / copies * summed / n
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


def lora_table(name: str = "Qwen2.5-VL-7B") -> str:
    """By the paper's recipe, by LoRA and with all weights trained; – where that does not fit."""
    full, by_lora = recipe("paper"), recipe("paper", lora=LORA)
    parts = [part for name in ("step", "training", "prefill", "decoding", "traffic") for part in (f"{name} s", "full")]
    lines = [f"| {' | '.join(['devices', *parts, 'times as fast'])} |", "|---" * 12 + "|"]
    for devices in (1, 8, 16, 32, 64):
        it, other = step(name, by_lora, devices), step(name, full, devices)
        fits = plan(SIZES[name], full, devices).peak <= USABLE * H100.gib * GIB
        cells = [str(devices)]
        for part in ("seconds", "train", "prefill", "decode", "traffic"):
            cells += [short(getattr(it, part)), short(getattr(other, part)) if fits else "–"]
        faster = f"{other.seconds / it.seconds:.2f}" if fits else "–"
        lines.append(f"| {' | '.join([*cells, faster])} |")
    return "\n".join(lines)


def short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 or value == int(value) else f"{value:.1f}"


def roofline_shares(rank: int = 0, shapes: Sequence[str] = ("3B", "7B")) -> dict[tuple[str, str], Shares]:
    """What SHARES has, counted by bench/roofline.py: a decode batch of 32 × 4, a prefill, a micro-batch trained.

    With the `rank` of adapters what LORA_SHARES has.
    """
    import roofline

    found = {}
    for shape in shapes:
        config = roofline.SHAPES[shape]
        _, decode, _, forward, kept, _, recomputed, *_ = roofline.passes(config, roofline.Sizes(), rank=rank)
        for device in DEVICES:
            card = replace(roofline.CARDS["H100"], bandwidth=device.bandwidth, peak=device.peak)
            reached = [
                one.limit(card) / one.seconds(card, one.launch(card)) for one in (decode, forward, kept, recomputed)
            ]
            found[device.name, f"Qwen2.5-VL-{shape}"] = Shares(*(round(share, 2) for share in reached))
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--lora", action="store_true", help="a step by LoRA, beside full fine-tuning")
    what.add_argument("--shares", action="store_true", help="the shares of each card's rates, from roofline.py")
    options = parser.parse_args(argv)
    if options.shares:
        for rank in (0, LORA):
            for (device, model), shares in roofline_shares(rank).items():
                print(device, model, f"LoRA {rank}" if rank else "full", *shares)
        return
    print(lora_table() if options.lora else scale_table())


if __name__ == "__main__":
    main()
