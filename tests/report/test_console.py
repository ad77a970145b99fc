"""The lines of a run: what they say, how wide they are, and the time that is left."""

import shlex
from types import SimpleNamespace

import pytest

from mmsr.config import EvalConfig, parse
from mmsr.report.console import Console
from mmsr.report.output import evaluation_command
from mmsr.tools import Tool


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def console(*argv: str, tools=("image_search", "text_search"), clock=None) -> Console:
    config = parse(argv)
    limits = {"image_search": config.max_images, "text_search": config.max_texts}
    made = {name: Tool(name, name, limits.get(name, 1), lambda call: None) for name in tools}
    world = SimpleNamespace(settings=SimpleNamespace(mix={"a": 0.25, "b": 0.75}))
    setup = SimpleNamespace(config=config, toolbox=SimpleNamespace(tools=made), world=world)
    return Console(setup, clock or Clock())


def metrics(step, seconds=2.1, **more) -> dict:
    ratios = {"search_ratio_image": 0.51, "search_ratio_text": 0.21}
    return {"step": step, "reward": 0.634, "accuracy": 1.0, **ratios, "seconds": {"rollout": seconds}, **more}


A = {"n": 3, "reward": 0.4, "accuracy": 0.2, "search_ratio_image": 1.0, "search_ratio_text": 0.0}
B = {"n": 1, "reward": 0.8, "accuracy": 0.6, "search_ratio_image": 0.0, "search_ratio_text": 0.4}


def test_lines_by_hand():
    """The columns of steps and evaluations are below each other, and a line fits 80 characters."""
    clock = Clock()
    made = console("--steps", "80", clock=clock)
    assert made.heading(0).splitlines() == [
        "runs/toy: steps 1 to 80, each 32 questions × 8 rollouts",
        "acc: accuracy; image, text: share of rollouts with such a call",
    ]
    clock.now = 15
    lines = [made.evaluation(0, "always_search", {"a": A, "b": B}, 12.0)]
    clock.now = 17
    lines.append(made.step(metrics(1)))
    assert lines == [
        "eval  0/80  reward 0.700  acc 0.500  image 0.25  text 0.30   12 s  always search",
        "step  1/80  reward 0.634  acc 1.000  image 0.51  text 0.21  2.1 s   6:35 left",
    ]
    assert max(map(len, [*made.heading(0).splitlines(), *lines])) <= 80
    long = console("--model", "x", "--recipe", "released", "--search", "none", "--eval-every", "100", clock=Clock())
    assert len(long.step(metrics(1000, 1234.5))) <= 100


def test_the_time_left_of_a_resumed_run_counts_what_is_done():
    """Steps by the pace of the last ones, saves included; evaluations apart; what was before the start not at all."""
    clock = Clock()
    made = console("--steps", "10", "--eval-every", "4", clock=clock)
    clock.now = 500  # opening everything
    assert made.heading(6).startswith("runs/toy: steps 7 to 10, ")
    clock.now = 510
    assert made.step(metrics(7)).endswith(" 0:30 left")
    clock.now = 520
    assert made.step(metrics(8)).startswith("step  8/10") and made.paces == pytest.approx([10, 10])
    clock.now = 524
    made.evaluation(8, "eval", {"a": A}, 3.0)
    made.evaluation(8, "eval_sampled", {"a": A}, 1.0)
    clock.now = 534
    assert made.step(metrics(9)).endswith("0:14 left"), "a step, and the evaluation after it"
    clock.now = 544
    assert made.step(metrics(10)).endswith("0:04 left")


def test_a_tool_of_ones_own_has_no_column():
    made = console("--max-texts", "0", tools=("image_search", "text_search", "crop_search"))
    line = made.step(metrics(1, search_ratio_crop=0.125))
    assert "  image 0.51  crop 0.12  " in line and "text" not in line
    assert "image, crop: share" in made.heading(0)


@pytest.mark.parametrize(
    "given, command",
    [
        ("", "--model runs/toy/model --data toy --out runs/toy-eval"),
        ("--toy basic --seed 3 --out 'my runs'",
         "--model 'my runs/model' --data toy --toy basic --seed 3 --out 'my runs-eval'"),
        ("--penalty 0.9 --max-pixels 6272",
         "--model runs/toy/model --data toy --penalty 0.9 --max-pixels 6272 --out runs/toy-eval"),
        ("--model m --data d.jsonl --search none --out o",
         "--model o/model --data FILE --search SEARCH --out o-eval"),
        ("--model m --recipe paper --max-texts 1 --out o",
         "--model o/model --data FILE --search SEARCH --recipe paper --max-texts 1 --out o-eval"),
        ("--model m --max-pixels 451584 --out o",
         "--model o/model --data FILE --search SEARCH --max-pixels 451584 --out o-eval"),
        ("--shapes any --penalty-per-call --max-turns 8",
         "--model runs/toy/model --data toy --penalty-per-call --shapes any --max-turns 8 --out runs/toy-eval"),
        ("--lora 16", "--adapter runs/toy/adapter --data toy --out runs/toy-eval"),
        ("--toy-model qwen3 --lora 16", "--adapter runs/toy/adapter --data toy --toy-model qwen3 --out runs/toy-eval"),
        ("--model m --data d.jsonl --search none --grammar hermes --thinking on --out o",
         "--model o/model --data FILE --search SEARCH --prompts hermes --grammar hermes --thinking on --out o-eval"),
        ("--model m --lora 16 --merge --out o", "--model o/model --data FILE --search SEARCH --out o-eval"),
        ("--model m --adapter a --out o",
         "--model m --adapter o/adapter --data FILE --search SEARCH --out o-eval"),
    ],
)  # fmt: skip
def test_the_next_command_evaluates_another_way(given, command):
    said = evaluation_command(parse(shlex.split(given)))
    assert said == f"python eval.py {command}"
    parse(shlex.split(said)[2:], EvalConfig, "eval.py")
