"""examples/plain_grpo.py against mmsr: the plain form and the fast one sample the same tokens and learn the same.

They share the forward pass, `Packed`, `mrope_positions` and the tokenizer, which other tests hold to transformers.
"""

import copy
import re
from pathlib import Path
from types import ModuleType
from typing import Sequence

import pytest
import torch
from helpers import SGD, report

from examples import plain_grpo
from examples.plain_grpo import Policy, add_gradient, roll_out, sampled_logps, set_advantages, set_reward
from mmsr import attention
from mmsr.engine import Engine, sampling_key
from mmsr.episode import Episode, Example, Observation, Turn
from mmsr.grpo import group_advantages
from mmsr.reward import RewardRule, score
from mmsr.rollout import Limits, Rollout
from mmsr.tools import IMAGE_SEARCH, Toolbox, search_tools
from mmsr.toy.world import LOOK_IT_UP
from mmsr.update import Trainer, split

ROOT = Path(__file__).parents[1]
LR = 0.3  # of plain gradient descent: far enough for the clip to act in a second update


@pytest.fixture(scope="module")
def policy(folder, world):
    return Policy(folder, world.web)


def with_own_weights(policy: Policy) -> Policy:
    """The same policy in a model of its own."""
    other = copy.copy(policy)
    other.model = copy.deepcopy(policy.model)
    return other


def questions(world, n: int):
    return world.train[:: len(world.train) // n][:n]


def plain_rollouts(policy: Policy, world, examples, group_size: int) -> list[Episode]:
    episodes = []
    for group_id, example in enumerate(examples):
        for sample in range(group_size):
            episode = Episode(example, group_id, sample)
            roll_out(policy, world.web, episode, sampling_key(0, 1, group_id, sample))
            episodes.append(episode)
    return episodes


def fast_rollouts(policy: Policy, world, examples, group_size: int, temperature: float = 1.0) -> list[Episode]:
    """The same by engine and rollout. Few slots, so that sequences of other groups take those that get free."""
    turns = plain_grpo.MAX_TURNS
    engine = Engine(
        policy.model,
        policy.chat.stop_id,
        policy.suppressed,
        slots=5,
        max_tokens=256,
        turn_tokens=plain_grpo.TURN_TOKENS,
        temperature=temperature,
    )
    image_search, _ = search_tools(world.web, turns - 1, 0)
    rollout = Rollout(engine, policy.chat, Toolbox([image_search], inline=True), Limits(turns, 56 * 56, 64 * 64))
    return rollout(examples, group_size, (0, 1))


@pytest.fixture(scope="module")
def batch(policy, world):
    """64 rollouts of 8 questions, their rewards made to differ within each group."""
    episodes = fast_rollouts(policy, world, questions(world, 8), 8)
    rewards = torch.rand(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for episode, reward in zip(episodes, rewards.tolist()):
        episode.reward = reward
    for start in range(0, 64, 8):
        set_advantages(episodes[start : start + 8])
    assert sum(len(episode.turns) > 1 for episode in episodes) > 5
    return episodes


# ---- the gradient


def fast_gradients(policy, reference, episodes, updates: int, **options) -> tuple[list[tuple[dict, dict]], dict]:
    """The trainer's updates of a batch, in small micro-batches: weights before each and gradient; and its metrics."""
    model = copy.deepcopy(policy.model)
    optimizer = SGD(model)
    usual = dict(
        reference=reference.model if plain_grpo.KL else None,
        kl=plain_grpo.KL,
        clip_low=plain_grpo.CLIP_LOW,
        clip_high=plain_grpo.CLIP_HIGH,
        loss_norm="sequence",
        micro_tokens=500,
        max_grad_norm=1e9,
    )
    trainer = Trainer(model, optimizer, policy.suppressed, **(usual | options))
    found = []
    step = optimizer.step

    def recorded(lr):
        gradient = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        found.append((copy.deepcopy(model.state_dict()), gradient))
        step(lr)

    optimizer.step = recorded
    return found, trainer.step(split(episodes, updates, 8), LR)


def plain_gradient(policy, reference, episodes, weights, add_gradient=add_gradient) -> dict[str, torch.Tensor]:
    """The gradient at other weights than those of `policy`, which give π_old."""
    now = with_own_weights(policy)
    episodes = [copy.copy(episode) for episode in episodes]
    for episode in episodes:
        with torch.no_grad():
            old = sampled_logps(now, episode)
        logps = torch.zeros(len(episode.input_ids))
        logps[torch.tensor(episode.loss_mask) == 1] = old
        episode.logps = logps.tolist()
    now.model.load_state_dict(weights)
    add_gradient(now, reference, episodes)
    return {name: parameter.grad for name, parameter in now.model.named_parameters()}


def relative(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Largest difference over all parameters, relative to the largest gradient."""
    assert ours.keys() == theirs.keys()
    largest = max(gradient.abs().max() for gradient in theirs.values())
    return max(float((ours[name] - theirs[name]).abs().max() / largest) for name in theirs)


@pytest.mark.first_is_quick
@pytest.mark.parametrize("kl", [0.0, 0.3])
@pytest.mark.parametrize("updates", [1, 2])
def test_trainer_has_another_gradient_than_the_plain_form(policy, batch, kl, updates, monkeypatch, record_property):
    """The second update of a batch is far from π_old, so that ratios differ from 1 and some are clipped."""
    monkeypatch.setattr(plain_grpo, "KL", kl)
    monkeypatch.setattr(plain_grpo, "CLIP_HIGH", 0.1)
    reference = with_own_weights(policy)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for parameter in reference.model.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
    steps, metrics = fast_gradients(policy, reference, batch, updates)
    assert len(steps) == updates
    assert (metrics["clip_fraction"] > 0.03) == (updates == 2) and (metrics["kl"] > 1e-3) == (kl > 0)
    for number, ((weights, fast), part) in enumerate(zip(steps, split(batch, updates, 8)), start=1):
        difference = relative(plain_gradient(policy, reference, part, weights), fast)
        report(record_property, f"gradient of update {number}, kl {kl}", difference)
        assert difference < 1e-6


# What docs/algorithm.md changes in the plain form, by option.
CHANGES: dict[str, list[tuple[str, str]]] = {}
option = ""
for row in (ROOT / "docs/algorithm.md").read_text(encoding="utf-8").partition("## In the plain form")[2].splitlines():
    cells = re.findall(r"`([^`]+)`|\| (and) ", row)
    if row.startswith("| ") and len(cells) == 3:
        option = cells[0][0] or option
        CHANGES.setdefault(option, []).append((cells[1][0], cells[2][0]))
TOGETHER = {  # options of the trainer, by those of the command line, with bounds that a second update reaches
    ("--loss-norm token",): dict(loss_norm="token", clip_low=0.2, clip_high=0.1),
    ("--loss gspo",): dict(loss="gspo", clip_low=0.01, clip_high=0.01),
    ("--loss cispo", "--loss-norm token"): dict(loss="cispo", loss_norm="token", clip_low=0.9, clip_high=0.1),
    ("--loss-norm constant", "--advantage none-std"): dict(
        loss="dr_grpo", loss_norm="constant", token_limit=128, clip_low=0.002, clip_high=0.002
    ),
}


def changed(options: Sequence[str]) -> ModuleType:
    """The plain form with these lines changed."""
    source = Path(plain_grpo.__file__).read_text(encoding="utf-8")
    for option in options:
        for line, becomes in CHANGES[option]:
            assert source.count(line) == 1, line
            source = source.replace(line, becomes)
    module = ModuleType("changed_plain_grpo")
    module.__file__ = plain_grpo.__file__
    exec(source, module.__dict__)
    return module


@pytest.mark.first_is_quick
@pytest.mark.parametrize("options", TOGETHER, ids=" ".join)
def test_the_page_changes_something_else_in_the_plain_form_than_the_option_does(
    policy, batch, options, monkeypatch, record_property
):
    """The gradient of a second update, for which ratios are not 1 and some are clipped."""
    form = changed(options)
    trained = TOGETHER[options]
    form.CLIP_LOW, form.CLIP_HIGH, form.KL = trained["clip_low"], trained["clip_high"], 0.0
    monkeypatch.setattr(plain_grpo, "KL", 0.0)
    episodes = [copy.copy(episode) for episode in batch]
    if "--advantage none-std" in options:
        for start in range(0, len(episodes), 8):
            form.set_advantages(episodes[start : start + 8])
        rewards = torch.tensor([episode.reward for episode in episodes], dtype=torch.float64)
        groups = torch.tensor([episode.group_id for episode in episodes])
        fast, _ = group_advantages(rewards, groups, plain_grpo.GROUP_EPS, divide=False)
        assert fast.tolist() == pytest.approx([episode.advantage for episode in episodes], abs=1e-12)
    steps, metrics = fast_gradients(policy, policy, episodes, 2, **trained)
    assert 0.03 < metrics["clip_fraction"] < 0.9
    (_, (weights, fast)), part = steps, split(episodes, 2, 8)[1]
    difference = relative(plain_gradient(policy, policy, part, weights, form.add_gradient), fast)
    report(record_property, f"gradient of the second update, {' '.join(options)}", difference)
    assert difference < 3e-6
    assert relative(plain_gradient(policy, policy, part, weights), fast) > 1e-3, "unchanged, it is another"


def test_advantages_are_others_than_those_of_the_plain_form(batch):
    rewards = torch.tensor([episode.reward for episode in batch], dtype=torch.float64)
    groups = torch.tensor([episode.group_id for episode in batch])
    advantages, varied = group_advantages(rewards, groups, plain_grpo.GROUP_EPS)
    assert advantages.tolist() == pytest.approx([episode.advantage for episode in batch], abs=1e-12)
    assert varied.tolist() == [episode.trained for episode in batch]
    equal = [Episode(batch[0].example, 0, sample, reward=0.1) for sample in range(8)]
    set_advantages(equal)
    assert [episode.advantage for episode in equal] == [0.0] * 8 and not any(episode.trained for episode in equal)


# ---- the tokens


@pytest.mark.first_is_quick
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_engine_samples_other_tokens_than_the_plain_form(policy, world, temperature, monkeypatch):
    """Token for token, over conversations with searches in the middle. Attention is summed in fp64 in both, so that
    neither the cache nor the packs round otherwise."""
    attention.sum_in_fp64(True)
    group_size = 4
    if not temperature:
        monkeypatch.setattr(plain_grpo, "draw", lambda logps, key, index: int(logps.argmax()))
        group_size = 1
    examples = questions(world, 6)
    plain = plain_rollouts(policy, world, examples, group_size)
    fast = fast_rollouts(policy, world, examples, group_size, temperature)
    for ours, theirs in zip(plain, fast, strict=True):
        assert ours.input_ids == theirs.input_ids
        assert ours.loss_mask == theirs.loss_mask
        assert ours.prompt_length == theirs.prompt_length
        assert [image.key for _, image in ours.images] == [image.key for _, image in theirs.images]
        assert [turn.text for turn in ours.turns] == [turn.text for turn in theirs.turns if turn.role == "assistant"]
        assert ours.logps == pytest.approx(theirs.logps, abs=1e-5)
    assert sum(episode.searches(IMAGE_SEARCH) for episode in fast) > 0


# ---- the reward

RIGHT = "<reason> so . </reason> <answer> mafiku </answer>"
WRONG = "<reason> so . </reason> <answer> vevu </answer>"
TWO_REASONS = "<reason> so . </reason> <reason> so . </reason> <answer> mafiku </answer>"
NOTHING = "I do not know"


@pytest.mark.parametrize("searched", [False, True])
@pytest.mark.parametrize("last", [RIGHT, WRONG, TWO_REASONS, NOTHING, LOOK_IT_UP])
def test_reward_of_the_toy_recipe_is_another_than_that_of_the_plain_form(policy, last, searched):
    said = [LOOK_IT_UP, last] if searched else [last]
    plain = Episode(Example("e", b"", "what is this ?", ("mafiku",)), 0, 0)
    for text in said:
        action = policy.chat.parse(text)
        plain.turns.append(Turn("assistant", text, 0, 0, action.name, action.query))
    fast = copy.deepcopy(plain)
    if searched:
        fast.turns.insert(1, Turn("tool", "", 0, 0, IMAGE_SEARCH, observation=Observation(source="toy")))
    score([fast], RewardRule("paper"), policy.chat.well_formed)
    reward, right, counted = set_reward(plain, policy.chat)
    assert reward == plain.reward == pytest.approx(fast.reward)
    assert (right, counted) == (fast.reward_parts["accuracy"], fast.searches())


# ---- the program


@pytest.mark.slow
def test_a_step_of_the_program_prints_nothing(folder, capsys, monkeypatch):
    monkeypatch.setattr(plain_grpo, "GROUP_SIZE", 2)
    plain_grpo.main(["--steps", "1", "--model", str(folder)])
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("step 1: reward ") and "accuracy" in line and "searches" in line


@pytest.mark.parametrize("options", [["--steps", "many"], ["--steps", "0"], ["--stepz", "1"], ["--model", "nowhere"]])
def test_a_wrong_option_is_not_told_in_one_line(options, capsys):
    with pytest.raises(SystemExit) as end:
        plain_grpo.main(options)
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("plain_grpo.py: error: ")


def test_the_file_that_is_read_first_is_long_or_names_lines_that_are_not_there():
    source = Path(plain_grpo.__file__).read_text(encoding="utf-8")
    _, table, code = re.split(r"\n\| the plain line .*|\n\"\"\"\n", source, maxsplit=2)
    assert len(source.splitlines()) <= 200
    rows = re.findall(r"^\| ([^-].*?) +\|.*: (.*?) +\|$", table, re.M)
    assert len(rows) == 7
    for line, files in rows:
        assert line.removesuffix("...)") in code
        for file in re.split(", ", files):
            assert (Path(attention.__file__).parent / file).is_file()
