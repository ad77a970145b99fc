"""The cost of slow tools in a rollout: seconds with a tool that takes half a second, and with one that takes no time.

    python bench/latency.py --runs 3

Every episode searches once, after its first turn, and answers after its second. Turns have random lengths, so that
searches start at all times, as in training. Tools run in threads while the other episodes decode: as long as there are
others, latency costs nothing.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import common
import torch

from mmsr import model
from mmsr.chat import PROMPTS, Chat
from mmsr.engine import Engine
from mmsr.episode import Example, Hit, Observation
from mmsr.rollout import Limits
from mmsr.tools import Toolbox, search_tools
from mmsr.toy.base import build_tokenizer


class SlowWeb:
    def __init__(self, latency: float):
        self.latency = latency

    def image_search(self, image: bytes, question: str, image_url: str = "") -> Observation:
        time.sleep(self.latency)
        return Observation(tuple(Hit("a title") for _ in range(5)))


class UnevenTurns(Engine):
    """Turns end after a length drawn for each, as those of a trained model do."""

    def _start_turns(self, scores, sequences):
        ended = super()._start_turns(scores, sequences)
        for sequence in sequences:
            longest, start = self.turn_tokens, len(sequence.ids)
            drawn = longest // 4 + (sequence.key + start) % (longest - longest // 4)
            self.state.limit[sequence.slot] = start + max(2, drawn)
        return ended


def roll_out(policy, folder: Path, latency: float, options) -> float:
    tools = search_tools(SlowWeb(latency), max_images=1, max_texts=0)
    chat = Chat(folder, PROMPTS / "toy", tools)
    suppressed = chat.suppressed_tokens(policy.config.vocab_size)
    suppressed[chat.stop_id] = True
    engine = UnevenTurns(
        policy, chat.stop_id, suppressed, slots=options.slots, max_tokens=2000, turn_tokens=options.turn_tokens
    )
    rollout = common.ForcedSearch(engine, chat, Toolbox(tools, inline=False), Limits(2, 56 * 56, 2**24))
    examples = [Example(str(i), common.picture(56, i), "who made this ?", ("",)) for i in range(options.questions)]
    return common.timed(lambda: rollout(examples, options.group))[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--latency", type=float, default=0.5, help="seconds that a search takes")
    parser.add_argument("--questions", type=int, default=32)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--slots", type=int, default=128)
    parser.add_argument("--turn-tokens", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = build_tokenizer()
        tokenizer.save(str(Path(folder) / "tokenizer.json"))
        policy = model.random_model(common.tiny_config(tokenizer), seed=0)
        without, with_latency = [], []
        for _ in range(options.runs):
            without.append(roll_out(policy, Path(folder), 0.0, options))
            with_latency.append(roll_out(policy, Path(folder), options.latency, options))
    print(common.machine())
    n = options.questions * options.group
    serial = n * options.latency
    ratio = statistics.median(with_latency) / statistics.median(without)
    print(f"{n} episodes, {options.slots} slots, a search each; one after another: {serial:.0f} s\n")
    header = ["tools at once, s", f"tools of {options.latency} s, s", "ratio"]
    print(common.table(header, [[common.spread(without), common.spread(with_latency), f"{ratio:.2f}"]]))


if __name__ == "__main__":
    main()
