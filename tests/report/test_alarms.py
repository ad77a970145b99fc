"""Alarms over made-up lines of metrics.jsonl."""

import json
import math

import pytest

from mmsr.report import alarms

SOUND = {
    "search_ratio": 0.5,
    "entropy": 0.1,
    "logp_gap": 1e-7,
    "tool_failures": 0,
    "tool_calls": 40,
    "tool_errors": {},
    "response_tokens": 20.0,
    "zero_std_groups": 3,
    "skipped_updates": 0,
    "status": {"answered": 30, "length": 2},
    "tokens": {"trained": 900},
}
NOTHING = {"tokens": {"trained": 0}, "entropy": None, "logp_gap": None}


def run(*changes, dtype="float32", may_search=True) -> tuple[list[list[str]], list[str]]:
    """Words of each step's alarms, and all that is said, where steps differ from a sound one in `changes`."""
    lines, words, said = [], [], []
    for change in changes:
        lines.append({**SOUND, **change})
        found = alarms.alarms(lines, dtype, may_search)
        said += alarms.to_say(found, lines[:-1])
        words.append(list(found))
        if found:
            lines[-1]["alarms"] = list(found)
    return words, said


def test_a_sound_run_raises_alarms():
    assert run(*[{}] * 20) == ([[]] * 20, [])
    lively = [{"search_ratio": share, "entropy": e} for share in (0, 1) for e in (0.02, 1.0)] * 5
    assert run(*lively) == ([[]] * 20, []), "what goes up and down stays in no corner"


def test_a_budget_that_ends_dynamic_sampling_is_told_in_every_step_or_not_at_all():
    full, short = ({"resampled": {"short_of_budget": value}} for value in (False, True))
    words, said = run(full, short, short, full)
    assert words == [[], ["resample-budget"], ["resample-budget"], []]
    assert len(said) == 1 and "do not do for the questions that --resample would ask" in said[0]


@pytest.mark.parametrize(
    "word, change, said",
    [
        ("never-searches", {"search_ratio": 0.0}, "no rollout has searched"),
        ("always-searches", {"search_ratio": 1.0}, "every rollout has searched"),
        ("entropy-low", {"entropy": 1e-4}, "entropy has been under 0.005"),
        ("entropy-high", {"entropy": 6.2}, "entropy has been over 3"),
        ("entropy-high", {"entropy": math.inf}, "entropy has been over 3"),
        ("no-gradient", {"grad_norm": 0.0, "zero_std_groups": 4}, "the gradient has been 0"),
        ("gap", {"logp_gap": 0.01}, "sampler and trainer disagree"),
        ("out-of-tokens", {"status": {"length": 32}}, "every rollout has run out of tokens"),  # kept for the KL term
        ("equal-rewards", {**NOTHING, "zero_std_groups": 4}, "the rewards of each group have been equal"),
    ],
)
def test_a_collapse_is_not_told_or_told_in_every_step(word, change, said):
    words, sentences = run(*[change] * 4, {}, *[change] * 7, {}, *[change] * 6)
    assert words == [[]] * 9 + [[word]] * 3 + [[]] * 5 + [[word]] * 2
    assert len(sentences) == 2 and all(sentence.startswith(said) for sentence in sentences), "once each time it begins"


def test_a_model_that_cannot_search_is_blamed_for_it_and_bf16_for_its_rounding():
    assert run(*[{"search_ratio": 0.0}] * 9, may_search=False)[1] == []
    assert run(*[{"logp_gap": 0.02}] * 9, dtype="bfloat16")[1] == []
    assert run(*[{"logp_gap": 0.2}] * 5, dtype="bfloat16")[0][-1] == ["gap"]


def test_updates_are_skipped_in_silence_where_others_are_not():
    words, said = run({"skipped_updates": 1}, {"skipped_updates": 1}, {}, {"skipped_updates": 3})
    assert words == [["skipped"], ["skipped"], [], ["skipped"]]
    assert [sentence[:22] for sentence in said] == ["1 updates were skipped", "3 updates were skipped"]


def test_failed_tools_are_told_once_or_over_several_lines():
    down = {"tool_failures": 3, "tool_errors": {"OSError: no\nroute " + "x" * 999: 2, "y": 1}}
    words, said = run({"tool_failures": 2}, down, down)
    assert words == [[], ["tools"], ["tools"]] and len(said) == 2
    assert said[0].startswith("3 of 40 tool calls failed, most often: OSError: no route xxx") and len(said[0]) < 250
    assert run({"tool_calls": 0})[1] == []


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"status": {"length": 32}, "response_tokens": 0.0}, "32 of 32 rollouts ran out of tokens (raise --max-tokens"),
        ({"status": {"length": 32}, "zero_std_groups": 4}, "32 of 32 rollouts ran out of tokens"),
        ({"status": {"tool-error": 32}}, "32 of 32 were left out because a tool failed"),
        (
            {"status": {"tool-error": 30, "length": 2}},
            "2 of 32 rollouts ran out of tokens (raise --max-tokens or --turn",
        ),
        ({"skipped_updates": 2}, "all 2 updates met a value that is not finite"),
        ({"response_tokens": 0.0}, "none of 32 rollouts has a token of the model's own"),
        ({"zero_std_groups": 0, "spared": 5}, "5 of 32 rollouts were spared"),
        ({"zero_std_groups": 0}, "none of 32 rollouts is right"),  # only --algorithm sft has no such groups
    ],
)
def test_a_step_trains_nothing_in_silence(changes, said):
    words, sentences = run({**NOTHING, **changes}, {**NOTHING, **changes})
    assert words == [["untrained"]] * 2 and len(sentences) == 2, "each time"
    assert sentences[0].startswith(f"nothing was trained: {said}")


def test_equal_rewards_are_taken_for_a_fault():
    equal = {**SOUND, **NOTHING, "zero_std_groups": 4}
    assert alarms.untrained(equal) == "" and alarms.stalled([equal] * 9) == 0


def test_stalled_steps_are_counted_over_trained_ones():
    empty = {**SOUND, **NOTHING, "status": {"length": 32}}
    assert alarms.stalled([empty, empty, SOUND, empty]) == 1
    assert alarms.stalled([SOUND, empty, empty]) == 2 == alarms.stalled([empty] * 2)
    assert alarms.stalled([SOUND]) == alarms.stalled([]) == 0
    assert alarms.never_trained([empty] * 3) and not alarms.never_trained([empty, SOUND, empty])


def test_a_resumed_run_says_otherwise_than_one_that_was_not_cut():
    """In the file a NaN is null."""
    lines = [{**SOUND, "search_ratio": 1.0, "entropy": math.nan, "logp_gap": math.nan} for _ in range(5)]
    read = json.loads(json.dumps([{**line, "entropy": None, "logp_gap": None} for line in lines[:4]]))
    assert alarms.alarms(lines, "float32", True) == alarms.alarms([*read, lines[4]], "float32", True)
