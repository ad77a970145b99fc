"""Recorded conversations through a checkpoint: does it generate, greedily, the recorded turns?

    python bench/replay_released.py --model lmms-lab/MMSearch-R1-7B --recipe released --turn-tokens 512 \\
        --data fvqa_train.parquet --search replay:transcripts.jsonl

Options are those of eval.py. The file behind `replay:` has the conversations, the data their questions and pictures,
found by id. Before every recorded model turn the conversation is forced up to it, its searches replayed; then the model
writes one turn, which is compared. A line of the file is {"data_id", "turns": [{"response", "tool_result"}]}; where a
turn has "input_tokens", its prefix is compared in length too. Two things can make a sound checkpoint differ: thumbnails
are recorded as addresses, which are not followed, so a turn after an image search sees only titles; and bfloat16
decides near ties by the order of its sums, after which a greedy turn may continue differently.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, Sequence

from common import table

from eval import open_setup
from mmsr.assemble import Setup
from mmsr.config import EvalConfig, parse
from mmsr.data.recorded import RecordedTurn, recorded_turns
from mmsr.episode import ANSWERED, Example
from mmsr.rollout import Rollout, Script
from mmsr.system.errors import UserError
from mmsr.system.files import json_object, lines
from mmsr.system.parallel import distributed, exit_process


class OneTurn(Rollout):
    """Ends an episode when the model has written one turn of its own."""

    def _act(self, conversation, turn):
        if turn.forced:
            super()._act(conversation, turn)
        else:
            self._end(conversation, ANSWERED)


def replay(setup: Setup, examples: Sequence[Example], recorded: dict[str, list[RecordedTurn]]) -> list[dict[str, Any]]:
    """For each recorded turn of these examples: its number from 0, what was recorded and what the model says now."""

    def script(example: Example, sample: int) -> Script:
        """Sample k is asked for turn k; one behind the last turn has nothing to say."""
        return Script([turn.response for turn in recorded[example.id]][:sample])

    plain = setup.new_rollout(setup.model, temperature=0.0)
    rollout = OneTurn(plain.engine, plain.chat, plain.toolbox, plain.limits)
    most = max(len(recorded[example.id]) for example in examples)
    found = []
    for episode in rollout(examples, most, scripts=script):
        turns = recorded[episode.example.id]
        said = [turn for turn in episode.turns if turn.role == "assistant"]
        if episode.sample >= len(turns) or not said or said[-1].forced:  # the prefix alone did not fit
            continue
        then, now = turns[episode.sample], said[-1]
        texts = [setup.chat.assistant(then.response), setup.chat.assistant(now.text)]
        found.append(
            {
                "id": episode.example.id,
                "turn": episode.sample,
                "prefix": now.start,
                "then": then.response,
                "now": now.text,
                "same": then.response.strip() == now.text.strip(),
                "leading": len(os.path.commonprefix(texts)) / len(texts[0]),
                "action": (setup.chat.parse(then.response).name, now.action),
            }
        )
    return found


def summary(found: Sequence[dict[str, Any]], prefixes: dict[tuple[str, int], int]) -> str:
    """A row per turn number: how many turns, how well they agree, and how many tokens longer what stood before is now.

    `prefixes`: tokens before a turn as recorded, by id and turn number.
    """
    rows = []
    for number in sorted({turn["turn"] for turn in found}):
        turns = [turn for turn in found if turn["turn"] == number]
        known = [turn for turn in turns if (turn["id"], number) in prefixes]
        longer = [turn["prefix"] - prefixes[turn["id"], number] for turn in known]
        leading = sum(turn["leading"] for turn in turns) / len(turns)
        actions = sum(turn["action"][0] == turn["action"][1] for turn in turns)
        same = sum(turn["same"] for turn in turns)
        rows.append([number + 1, len(turns), same, actions, f"{leading:.2f}", _range(longer)])
    return table(["turn", "n", "same text", "same action", "leading tokens that agree", "prefix longer by"], rows)


def _range(values: Sequence[int]) -> str:
    return f"{min(values)} to {max(values)}" if values else "not recorded"


def main(argv: Sequence[str]) -> None:
    config = parse(argv, EvalConfig, "replay_released.py")
    file = Path(config.search.removeprefix("replay:"))
    if not config.search.startswith("replay:") or file.suffix != ".jsonl":
        raise UserError(f"--search {config.search}: give replay:FILE.jsonl with recorded conversations")
    recorded = recorded_turns(file)
    with distributed(config.device, config.timeout) as ranks:
        setup, sets = open_setup(config, ranks)
        examples = {e.id: e for part in sets.values() for e in part if recorded.get(e.id)}
        if not examples:
            raise UserError(f"{file}: none of its data_ids is among the questions of --data {' '.join(config.data)}")
        found = replay(setup, list(examples.values()), recorded)
    records = [json_object(file, row, line) for row, (_, line) in enumerate(lines(file))]
    turns = [(str(r["data_id"]), number, turn) for r in records for number, turn in enumerate(r["turns"])]
    prefixes = {(name, number): turn["input_tokens"] for name, number, turn in turns if "input_tokens" in turn}
    for turn in found:
        if not turn["same"]:
            print(f"{turn['id']}, turn {turn['turn'] + 1}\n  then: {turn['then']!r}\n  now:  {turn['now']!r}")
    missing = len(recorded) - len(examples)
    print(f"\n{summary(found, prefixes)}\n\n{len(examples)} conversations; {missing} have no question in the data")
    exit_process(ranks)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"replay_released.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None
