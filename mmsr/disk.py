"""The disk plan: what a run writes under --out and what it fetches from the hub, computed before it starts.

Weights, masters and moments are exact but for the headers of files. Of rollouts only an estimate is possible, on the
generous side. Tests compare both with the files of a run.

In the comments of this module P is the number of parameters, and `item` the bytes of a number in the type of the
computation.
"""

from __future__ import annotations

import math
from pathlib import Path

from mmsr.config import FVQA_SEARCH, Config
from mmsr.model import ModelConfig
from mmsr.shapes import sizes, trained

HEADER = 512  # bytes of a safetensors file's header that tell of one tensor, at most
TOKENIZER = 16 * 2**20  # of the files beside the weights

# Of OUT/rollouts, bytes. A text is written twice: as the model saw it, and in the fields of a search's result.
LINE = 1500  # of a rollout's line without its texts
SAMPLED = 250  # tokens that the model writes in a rollout
TOKEN = 5  # of a token's text
DETAIL = 25  # of a sampled token in a line that has every one's text and probability
DETAILED = 1024  # rollouts of a step whose lines are such
IMAGE_RESULT = 2_000  # of an image search's titles and addresses
TEXT_RESULT = 10_000  # of a text search's passages or summaries

FVQA = {"questions": 2 * 10**9, "recorded searches": 3 * 10**9}  # assumed, of the files on the hub

PICTURES = 128 * 2**20  # of OUT/images, which is full then
REPORT = 32 * 2**20  # of report.html


def disk_needed(config: Config, model: ModelConfig, ranks: int = 1, item: int = 2) -> dict[str, int]:
    """Bytes that a run puts under --out, by part, when it is at its fullest: a save is written beside those kept.

    `ranks`: processes, whatever machines they are on: a save holds one copy. A resumed run has some of it already.
    """
    run = trained(model, config)
    whole = config.merge or not config.trains_adapters
    return {
        "checkpoints": saves_at_once(config) * save_bytes(config, model, ranks, item),
        "adapter": 4 * run.numbers() + 2 * HEADER * len(run.adapters),
        "model": model_bytes(model, item) if whole else 0,
        "rollouts": rollout_bytes(config),
        "pictures": PICTURES,
        "report": REPORT,
    }


def downloads(config: Config, model: ModelConfig) -> dict[str, int]:
    """Bytes that a run fetches from the hub, by part, unless they are in its cache: weights are published in bf16."""
    found = {"weights": 0, "questions": 0, "recorded searches": 0}
    if not Path(config.model).is_dir():
        found["weights"] = model_bytes(model, 2)
    if config.data.startswith("lmms-lab/FVQA"):
        found["questions"] = FVQA["questions"]
    if FVQA_SEARCH in config.back_ends.values():
        found["recorded searches"] = FVQA["recorded searches"]
    return found


def model_bytes(model: ModelConfig, item: int) -> int:
    """Bytes of a whole model's folder."""
    size = sizes(model)
    return item * size.count() + HEADER * len(size.shapes) + TOKENIZER


def save_bytes(config: Config, model: ModelConfig, ranks: int = 1, item: int = 2) -> int:
    """Bytes of one checkpoint: what is trained, its masters and moments. P counts what is trained alone.

    Weights of one process in bf16: weights 2 P, rest of the masters 2 P, bf16 moments 4 P. Else fp32, as adapters are:
    weights 4 P, moments 8 P.
    """
    run = trained(model, config)
    each = 8 if ranks == 1 and item < 4 else 12
    numbers = each * sizes(model).count(among=run.weights) + 12 * run.numbers()
    tensors = len(run.weights) + 2 * len(run.adapters)
    return numbers + 5 * HEADER * tensors * ranks  # weight, rest, two moments, count of steps


def saves_at_once(config: Config) -> int:
    """Checkpoints on the disk at most: --keep of them, and one that is being written."""
    made = math.ceil(config.steps / config.save_every) if config.save_every else 1
    return min(made, config.keep + 1)


def rollout_bytes(config: Config) -> int:
    """Bytes of OUT/rollouts when the run is over."""
    of_step = config.questions * config.group_size
    sampled = min(SAMPLED, config.max_turns * config.turn_tokens)
    found = config.max_images * IMAGE_RESULT + config.max_texts * TEXT_RESULT
    found = min(found, 2 * TOKEN * config.max_tokens)
    lines = of_step * (LINE + TOKEN * sampled + found)
    details = min(of_step, DETAILED) * DETAIL * sampled if config.log_tokens else 0
    return config.steps * (lines + details)
