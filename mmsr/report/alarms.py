"""What goes wrong with a training run, as its lines of metrics.jsonl show it. Every function depends on them alone.

So a resumed run says what the uninterrupted one would have said. An alarm is a word, in the step's line under `alarms`,
and a sentence that is printed. Bands are wide: a healthy run never leaves them. A run that does is worth a look, but it
continues. It is stopped (`stalled`) only where several steps in a row had nothing to train.
"""

from __future__ import annotations

import math
from typing import Any, Callable, Mapping, Sequence

from mmsr.episode import LENGTH, NOT_ASKED, TOOL_ERROR, UNJUDGED
from mmsr.system.errors import UserError

Line = Mapping[str, Any]  # of metrics.jsonl, about a step

TOOLS = 0.05  # share of a step's tool calls, and of the judge's verdicts, that may fail without a word
STEPS = 5  # in a row: a single step may be chance
ENTROPY = (0.005, 3.0)  # nats a token, as e^3 = 20 words that are alike; runs of the toy world go from .24 down to .02
GAP = {"float32": 1e-3, "bfloat16": 0.1}  # mean |sampler - trainer| of log-probabilities; 1e-8 in the toy world
# What a line must have to be one of the steps before.
NEEDED = {
    "search_ratio",
    "entropy",
    "logp_gap",
    "status",
    "tokens",
    "skipped_updates",
    "response_tokens",
    "zero_std_groups",
}
EVERY_STEP = ("tools", "judge", "untrained")  # said each time; the others when they begin


def alarms(lines: Sequence[Line], dtype: str, may_search: bool) -> dict[str, str]:
    """What is wrong with the last of these steps, a sentence by its word. `lines`: all steps of the run, in order.

    `dtype`: of the computation. `may_search`: whether the model can search, and decides on it.
    """
    last = lines[-1]
    found = {"tools": _tools(last), "judge": _judge(last), "untrained": untrained(last)}
    if last["skipped_updates"] and last["tokens"]["trained"]:  # where nothing was trained, `untrained` has the reason
        found["skipped"] = f"{last['skipped_updates']} updates were skipped: they met a value that is not finite"
    if last.get("resampled", {}).get("short_of_budget"):
        found["resample-budget"] = "the paid calls that are left do not do for the questions that --resample would ask"
    if may_search:
        found |= _searching(lines)
    found |= _sampling(lines, dtype)
    found |= _learning(lines)
    return {word: sentence for word, sentence in found.items() if sentence}


def _searching(lines: Sequence[Line]) -> dict[str, str]:
    found = {}
    if _lasts(lines, lambda line: line["search_ratio"] == 0):
        found["never-searches"] = f"no rollout has searched for {STEPS} steps"
    if _lasts(lines, lambda line: line["search_ratio"] == 1):
        found["always-searches"] = f"every rollout has searched for {STEPS} steps"
    return found


def _sampling(lines: Sequence[Line], dtype: str) -> dict[str, str]:
    found = {}
    low, high = ENTROPY
    gap = GAP[dtype]
    if _lasts(lines, lambda line: _number(line, "entropy") < low):
        same = "all rollouts of a question are the same"
        found["entropy-low"] = f"entropy has been under {low} for {STEPS} steps: {same}"
    if _lasts(lines, lambda line: _number(line, "entropy") > high):
        found["entropy-high"] = f"entropy has been over {high} for {STEPS} steps: tokens are drawn at random"
    if _lasts(lines, lambda line: _number(line, "logp_gap") > gap):
        what = "sampler and trainer disagree on log-probabilities"
        found["gap"] = f"{what}, by more than {gap} on average for {STEPS} steps"
    if _lasts(lines, lambda line: line["status"].get(LENGTH) == sum(line["status"].values())):
        found["out-of-tokens"] = f"every rollout has run out of tokens for {STEPS} steps; raise --turn-tokens"
    return found


def _learning(lines: Sequence[Line]) -> dict[str, str]:
    found = {}
    if _lasts(lines, lambda line: not line["tokens"]["trained"] and not untrained(line)):
        equal = f"the rewards of each group have been equal for {STEPS} steps"
        found["equal-rewards"] = f"{equal}: there is nothing to learn"
    if _lasts(lines, lambda line: line["tokens"]["trained"] and line.get("grad_norm", math.inf) == 0):
        # Groups of equal rewards that are kept (--zero-std keep) are trained, and their advantages are 0.
        zero = f"the gradient has been 0 for {STEPS} steps"
        found["no-gradient"] = f"{zero}, as if all rewards were equal: nothing is learnt"
    return found


def to_say(found: Mapping[str, str], before: Sequence[Line]) -> list[str]:
    """The sentences of the alarms to print: those of EVERY_STEP, and those that the step before did not have."""
    known = before[-1].get("alarms", ()) if before else ()
    return [said for word, said in found.items() if word in EVERY_STEP or word not in known]


def untrained(line: Line) -> str:
    """Why a step trained no token, with counts. Empty where it did, or where just each group's rewards were equal."""
    if line["tokens"]["trained"]:
        return ""
    ends = line["status"]
    n = sum(ends.values())
    cut = ends.get(LENGTH, 0)
    failed = ends.get(TOOL_ERROR, 0)
    unjudged = line.get("judged", {}).get(UNJUDGED, 0)
    if line["skipped_updates"]:
        why = f"all {line['skipped_updates']} updates met a value that is not finite"
    elif cut + failed + unjudged == n:
        reasons = []
        if cut:
            reasons.append(f"{cut} of {n} rollouts ran out of tokens (raise --max-tokens or --turn-tokens)")
        if failed:
            reasons.append(f"{failed} of {n} were left out because a tool failed")
        if unjudged:
            reasons.append(f"{unjudged} of {n} were left out because the judge failed")
        why = " and ".join(reasons)
    elif not line["response_tokens"]:
        why = f"none of {n} rollouts has a token of the model's own"
    elif line.get("spared"):
        spared = f"{line['spared']} of {n} rollouts were spared, for they ran out of tokens or their tools failed"
        why = f"{spared}, and no other differed from its group"
    elif not line["zero_std_groups"]:
        why = f"none of {n} rollouts is right, and only those are imitated"
    else:
        return ""
    return f"nothing was trained: {why}"


def stalled(lines: Sequence[Line]) -> int:
    """How many of the last steps in a row were `untrained`."""
    count = 0
    for line in reversed(lines):
        if not untrained(line):
            break
        count += 1
    return count


def stop_if_stalled(lines: Sequence[Line], most: int) -> None:
    """Raises UserError after `most` steps in a row that trained nothing: the weights will not change any more."""
    n = stalled(lines)
    if n >= most:
        why = untrained(lines[-1])
        raise UserError(f"{n} steps in a row trained nothing; in the last, {why}; mend that, or raise --max-skipped")


def never_trained(lines: Sequence[Line]) -> bool:
    """Whether no step trained a token."""
    return not any(line["tokens"]["trained"] for line in lines)


def _tools(line: Line) -> str:
    failed = line["tool_failures"]
    calls = line["tool_calls"]
    if failed <= TOOLS * calls:
        return ""
    most_frequent = next(iter(line["tool_errors"]))
    often = " ".join(most_frequent.split())
    return f"{failed} of {calls} tool calls failed, most often: {often:.200}"


def _judge(line: Line) -> str:
    verdicts = line.get("judged", {})
    failed = verdicts.get(UNJUDGED, 0)
    asked = sum(verdicts.values()) - verdicts.get(NOT_ASKED, 0)
    if failed <= TOOLS * asked:
        return ""
    return f"{failed} of {asked} verdicts of the judge failed, for instance: {line['judge_error']}"


def _lasts(lines: Sequence[Line], outside: Callable[[Line], bool]) -> bool:
    """Whether the last STEPS steps are all `outside` of what is healthy."""
    return len(lines) >= STEPS and all(outside(line) for line in lines[-STEPS:])


def _number(line: Line, key: str) -> float:
    """A number of a line. Where nothing was trained it is null in the file: NaN here, which is within every band."""
    return math.nan if line[key] is None else line[key]
