"""Write docs/walkthrough.md: one question of the toy world through the code, with the real tensors.

    python docs/walkthrough.py                 # on the toy base model, which is made first if it is not there (minutes)
    python docs/walkthrough.py --model DIR     # on another one

Every number on the page comes from the program's own objects, and what the page says of a number is asserted here.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import sys
import textwrap
from pathlib import Path
from typing import Iterable, Sequence

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.ticker import MaxNLocator
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mmsr import attention, grpo
from mmsr.chat import IMAGE_PAD, PROMPTS, Chat
from mmsr.engine import Engine
from mmsr.episode import ANSWERED, Episode, Example
from mmsr.model import VLModel, log_probs, mrope_positions
from mmsr.pack import Pack, pack, unique_tokens
from mmsr.pretrained.load import load
from mmsr.reward import RewardRule, score
from mmsr.rollout import Limits, Rollout
from mmsr.system.optimizer import MasterWeights
from mmsr.tools import Toolbox, search_tools
from mmsr.toy.base import base_model
from mmsr.toy.world import MAX_PIXELS, MIN_PIXELS, World
from mmsr.update import Trainer

PAGE = Path(__file__).with_suffix(".md")
FIGURES = PAGE.parent / "walkthrough"
GROUP = 4  # rollouts of the question
SEED = ("walkthrough",)
CLIP = 0.2
KL = 0.001
GROUP_EPS = 0.05
RATE = 5e-5  # a sixth of the toy recipe's: Adam's first step moves every weight by about the rate
BLUE, ORANGE, GREY, RED = "#4878cf", "#ee854a", "#d8d8d8", "#d65f5f"


# ---- the parts of a run, without its options


class WatchedEngine(Engine):
    """The engine, which also writes down who has which slot in each step."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.occupied: list[dict[int, tuple[int, str]]] = []  # a step: slot → (sequence's key, what it does)

    def step(self):
        ended = super().step()
        states = {}
        for slot, sequence in self.by_slot.items():
            states[slot] = (sequence.key, "waits" if sequence in ended or sequence.start_step is None else "decodes")
        self.occupied.append(states)
        return ended


class Parts:
    """Model, chat, tools and question that the page is about."""

    def __init__(self, folder: Path):
        self.world = World(0)
        self.tools = search_tools(self.world.web, 1, 0)  # one image search, no text search
        self.chat = Chat(folder, PROMPTS / "toy", self.tools)
        self.model = load(folder)
        self.reference = load(folder).requires_grad_(False)
        self.suppressed = self.chat.suppressed_tokens(self.model.config.vocab_size)  # (V,) bool
        self.rule = RewardRule("paper")

    def roll_out(self, example: Example) -> tuple[list[Episode], WatchedEngine, Rollout]:
        """The question's group of rollouts, scored, with their advantages."""
        engine = WatchedEngine(
            self.model, self.chat.stop_id, self.suppressed, slots=GROUP, max_tokens=128, turn_tokens=32
        )
        toolbox = Toolbox(self.tools, inline=True)
        limits = Limits(2, MIN_PIXELS, MAX_PIXELS, processor=self.model.config.vision.processor)
        rollout = Rollout(engine, self.chat, toolbox, limits)
        episodes = rollout([example], GROUP, SEED)
        score(episodes, self.rule, self.chat.well_formed)
        rewards = torch.tensor([episode.reward for episode in episodes], dtype=torch.float64)
        advantages, _ = grpo.group_advantages(rewards, torch.zeros(GROUP), GROUP_EPS)
        for episode, advantage in zip(episodes, advantages.tolist()):
            episode.advantage = advantage
        return episodes, engine, rollout

    def trainer(self) -> Trainer:
        optimizer = MasterWeights(self.model, betas=(0.9, 0.99), weight_decay=0.0)
        return Trainer(
            self.model, optimizer, self.suppressed, reference=self.reference, kl=KL, clip_low=CLIP, clip_high=CLIP
        )


def telling(parts: Parts) -> tuple[list[Episode], WatchedEngine, Rollout]:
    """The first question about an unknown emblem that is searched for twice with success, and guessed at twice."""
    for example in parts.world.train:
        if example.category != "unfamiliar":
            continue
        found = parts.roll_out(example)
        episodes = found[0]
        right = [e for e in episodes if e.reward_parts["accuracy"] == 1 and e.searches()]
        wrong = [e for e in episodes if e.status == ANSWERED and e.reward_parts["accuracy"] == 0 and not e.searches()]
        if len(right) == len(wrong) == GROUP // 2:
            return found
    raise SystemExit("walkthrough: no question of the toy world has such a group with this model")


# ---- Markdown


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in rows:
        lines.append("| " + " | ".join(str(cell) for cell in row) + " |")
    return "\n".join(lines)


def shown(text: str) -> str:
    """A token's text in a table's cell, where a bar would end the cell."""
    return "`" + text.replace("\n", "↵").replace("|", "\\|") + "`"


def number(value: float, digits: int = 3) -> str:
    """Without a leading zero, and without minus zero."""
    text = f"{value:.{digits}f}"
    if float(text) == 0:
        text = text.lstrip("-")
    return text.replace("0.", ".", 1) if text.startswith(("0.", "-0.")) else text


# ---- sections of the page


def reflowed(page: str) -> str:
    """The page with its paragraphs filled; tables, code, figures and headings as they are."""
    paragraphs = page.split("\n\n")
    for place, paragraph in enumerate(paragraphs):
        if not paragraph.startswith(("|", "#", "!", "    ", "<!--")):
            paragraphs[place] = textwrap.fill(" ".join(paragraph.split()), 120, break_on_hyphens=False)
    return "\n\n".join(paragraphs)


def section_question(example: Example) -> str:
    return f"""## 1. The question

![The emblem](walkthrough/picture.png)

An `Example` is a picture, a question and the accepted answers: here "{example.question}" and
`{example.answers[0]}`. Its category is *{example.category}*: the model was never taught this emblem. It can
guess, or search by picture."""


def prompt_rows(parts: Parts, episode: Episode) -> list[list[object]]:
    """Rows of the table of prompt tokens; the placeholders of the picture are one row."""
    n = episode.prompt_length
    ids = episode.input_ids[:n]
    spans = [(at, image.grid) for at, image in episode.images if at < n]
    positions, _ = mrope_positions(n, spans)  # (3, n)
    pad = parts.chat.added[IMAGE_PAD]
    texts = parts.chat.pieces(ids)
    rows: list[list[object]] = []
    for place, token in enumerate(ids):
        where = ", ".join(map(str, positions[:, place].tolist()))
        rows.append([place, shown("<|image_pad|>" if token == pad else texts[place]), token, where])
    return rows


def section_prompt(parts: Parts, episode: Episode) -> str:
    rows = prompt_rows(parts, episode)
    return f"""## 2. The question as tokens

`Chat.prompt` makes {len(rows)} tokens of it. Its last words, `search ?`, are the toy prompt's: they allow a search.
The picture's four placeholders, `<|image_pad|>`, get the vision tower's four vectors instead of an embedding.
Each token has three positions (time, row, column): on text they are equal, inside the picture time stands still
and rows and columns count up, and the text behind it continues from the largest number used, plus 1.

{table(["place", "token", "id", "positions"], rows)}"""


def section_rollout(parts: Parts, episode: Episode) -> str:
    n = episode.prompt_length
    ids = episode.input_ids[n:]
    texts = parts.chat.pieces(ids)
    rows: list[list[object]] = []
    for turn in episode.turns:
        if turn.role == "tool":
            text = "".join(texts[turn.start - n : turn.end - n])
            rows.append([f"{turn.start}–{turn.end - 1}", "tool", shown(text), 0, "", ""])
            continue
        for place in range(turn.start, turn.end):
            begins = turn.role if place == turn.start else ""
            logp = episode.logps[place]
            rows.append([place, begins, shown(texts[place - n]), 1, number(logp), number(math.exp(logp))])
    assert sum(row[3] for row in rows) == sum(episode.loss_mask)
    sampled = sum(episode.loss_mask)
    places = [place for place, mask in enumerate(episode.loss_mask) if mask]
    rarest = min(places, key=episode.logps.__getitem__)
    return f"""## 3. One rollout, token by token

The model samples a token at a time until its turn ends with `<|im_end|>`. `Chat.parse` finds a search in the turn's
text: the tool runs, and what it found is appended as a user turn. Then the model continues. Tokens that the model
sampled have mask 1 and a log-probability, {sampled} of them here; the tool's {len(ids) - sampled} tokens have
mask 0, and no loss will ever see them. The least likely token is {shown(texts[rarest - n])}, with
π = {number(math.exp(episode.logps[rarest]))}.

{table(["place", "begins", "token", "mask", "log π", "π"], rows)}"""


def section_group(parts: Parts, episodes: Sequence[Episode]) -> str:
    rewards = [episode.reward for episode in episodes]
    mean = sum(rewards) / len(rewards)
    variance = sum((reward - mean) ** 2 for reward in rewards) / (len(rewards) - 1)
    deviation = math.sqrt(variance)
    rows = []
    for episode in episodes:
        by_hand = (episode.reward - mean) / (deviation + GROUP_EPS)
        assert abs(by_hand - episode.advantage) < 1e-9
        rows.append(
            [
                episode.sample,
                episode.answer,
                episode.searches(),
                number(episode.reward_parts["accuracy"], 0),
                number(episode.reward_parts["format"], 0),
                number(episode.reward, 2),
                f"({number(episode.reward, 2)} − {number(mean, 4)}) / ({number(deviation, 4)} + .05)",
                number(episode.advantage),
            ]
        )
    header = ["rollout", "answer", "searches", "accuracy", "format", "reward", "equation (2)", "advantage"]
    return f"""## 4. Four rollouts, four rewards, four advantages

The same question is asked four times. The reward is `.9 · accuracy · .9^searched + .1 · format`: .91 for a
right answer after a search, 1 for a right one without, .1 for a wrong one in good form. The group's mean is
{number(mean, 4)}, its deviation {number(deviation, 4)}. No value network is needed: a rollout that did better
than the group's mean gets a positive advantage, a worse one a negative advantage, and they sum to zero.

{table(header, rows)}

![Mask strip](walkthrough/masks.png)

Each row is a rollout. Grey: the shared prompt. Blue: sampled, trained. Orange: what the search gave, not
trained."""


def section_generation(engine: WatchedEngine, rollout: Rollout, episodes: Sequence[Episode]) -> str:
    prompt = episodes[0].prompt_length
    forced = sum(len(e.input_ids) - e.prompt_length - sum(e.loss_mask) for e in episodes)
    sampled = sum(sum(e.loss_mask) for e in episodes)
    prefilled = rollout.counts["prefilled"]
    results = sum(turn.role == "tool" for e in episodes for turn in e.turns)
    assert prefilled == prompt + forced + results
    naive = 0
    for episode in episodes:
        naive += sum(place for place, mask in enumerate(episode.loss_mask) if mask)  # as many tokens stand before it
    return f"""## 5. How they were generated

The plain way runs the whole sequence through the model for every new token: {naive:,} tokens for these four
rollouts. The engine keeps keys and values in a cache with a *row* for the group's prompt and a *slot* for each
rollout's own tokens. It ran the prompt's {prompt} tokens once for the group, the {results} search results once, and
otherwise one token per slot and step: {prefilled} tokens prefilled and {sampled} sampled. (The results are
{forced} tokens; each is prefilled with the stop token in front of it, which was sampled and not run yet:
{prompt} + {forced} + {results} = {prefilled}.)

![Slots over time](walkthrough/slots.png)

Each row is a slot, each column a step of the engine. Orange: the rollout's turn has ended; it waits for its
tool, or it is finished. The others continue to decode."""


def section_pack(parts: Parts, episodes: Sequence[Episode], batch: Pack) -> str:
    apart = sum(len(e.input_ids) for e in episodes)
    packed = len(batch.input_ids)
    keys = len(batch.attention_fn.gather)
    prompt = episodes[0].prompt_length
    assert packed == unique_tokens(episodes) == apart - (GROUP - 1) * prompt - GROUP
    assert keys == packed + GROUP * prompt
    first = batch.episode_index.tolist().index(1)  # the first trained token of rollout 1
    texts = parts.chat.pieces(batch.targets.tolist())
    rows = []
    for place in (0, 1, 2, first, first + 1):
        rows.append([int(batch.episode_index[place]), int(batch.logits_index[place]), shown(texts[place])])
    return f"""## 6. The pack

For training the four rollouts are laid out as one sequence in which the prompt occurs once: `[prompt,
completion 0, completion 1, completion 2, completion 3]`. That is {packed} tokens instead of {apart}: the prompt is
there once instead of {GROUP} times, and the last token of each rollout is left out, because nothing is predicted
from it. So every linear layer sees the prompt's {prompt} tokens once. Inside attention each completion sees the
prompt and itself. Its keys are gathered by an index, and the prompt's are used {GROUP} times more:
{packed} + {GROUP} · {prompt} = {keys} keys for {packed} queries.

![What each query sees](walkthrough/attention.png)

A row is a query, a column a key; dark: seen. The first columns are the prompt, which all four see.

The loss reads hidden states only where a sampled token is predicted. `logits_index` says where, `targets` what. The
first token of *every* completion is predicted by the prompt's last hidden state, so row {int(batch.logits_index[0])}
occurs four times:

{table(["rollout", "row of the hidden state", "token that it predicts"], rows)}"""


def decision_token(batch: Pack, episodes: Sequence[Episode]) -> int:
    """The second trained token of the first rollout that guessed: behind `<reason>`, where it decides not to search."""
    guess = next(episode.sample for episode in episodes if episode.advantage < 0)
    first = batch.episode_index.tolist().index(guess)
    return first + 1


def by_hand(log_old: float, log_new: float, log_ref: float, advantage: float) -> dict[str, float]:
    """Equations (1) and (3) for one token, with Python's numbers."""
    ratio = math.exp(log_new - log_old)
    clipped = min(max(ratio, 1 - CLIP), 1 + CLIP)
    surrogate = min(ratio * advantage, clipped * advantage)
    gap = log_ref - log_new
    k3 = min(math.exp(gap) - gap - 1, 10.0)
    return {
        "ratio": ratio,
        "clipped": clipped,
        "surrogate": surrogate,
        "gap": gap,
        "k3": k3,
        "loss": KL * k3 - surrogate,
    }


def section_loss(parts: Parts, episodes: Sequence[Episode], batch: Pack) -> str:
    """Two updates on the same batch, so that in the second the ratio is not 1."""
    old = recomputed(parts, parts.model, batch)  # (R,)
    reference = recomputed(parts, parts.reference, batch)  # (R,)
    gap = (old - batch.sampled_logps).abs().max().item()
    parts.trainer().step([episodes], RATE)
    new = recomputed(parts, parts.model, batch)  # (R,)

    advantages = torch.tensor([episodes[i].advantage for i in batch.episode_index.tolist()])  # (R,)
    options = grpo.LossOptions(kl=KL, clip_low=CLIP, clip_high=CLIP)
    found = grpo.token_losses(new, old, advantages, options, reference)
    lengths = [sum(e.loss_mask) for e in episodes]
    weights = torch.tensor(grpo.episode_weights(lengths, "sequence", len(episodes), sum(lengths)))  # (E,)
    whole = float((found.loss * weights[batch.episode_index]).sum())

    place = decision_token(batch, episodes)
    owner = episodes[int(batch.episode_index[place])]
    hand = by_hand(float(old[place]), float(new[place]), float(reference[place]), owner.advantage)
    assert abs(hand["loss"] - float(found.loss[place])) < 1e-3, (hand, found.loss[place])
    token = shown(parts.chat.pieces([int(batch.targets[place])])[0])
    return f"""## 7. The loss of one token, by hand

The trainer runs the pack through the same model and gets log π of each trained token again. The largest
difference to what the sampler had is {size(gap)}: sampler and trainer are one code. In the first update on a
batch the ratio is 1 everywhere; so look at the second. After one update at a small rate, the token
{token} of rollout {owner.sample}, with which it begins a guess instead of a search, and whose advantage
is {number(owner.advantage)}, has

{equations(hand, float(old[place]), float(new[place]), float(reference[place]), owner)}

`grpo.token_losses` computes this for all {len(new)} tokens at once; the weighted sum is {number(whole, 4)}.
{clip_sentence(hand["ratio"], owner.advantage, int(found.clipped.sum()))}

What the first update did to the probability of each whole rollout (the product over its sampled tokens):

{table(["rollout", "advantage", "π(o) before", "after"], changes(episodes, batch, old, new))}

Rollouts with a positive advantage have become likelier, the others less likely. A training run repeats this:
the README's has 80 steps, each with 32 questions of eight rollouts."""


def equations(hand: dict[str, float], log_old: float, log_new: float, log_ref: float, owner: Episode) -> str:
    """The lines of `by_hand`, with its numbers."""
    advantage = owner.advantage
    plain = hand["ratio"] * advantage
    cut = hand["clipped"] * advantage
    tokens = sum(owner.loss_mask)
    ratio, clipped, surrogate, gap, k3, loss = (number(value, 4) for value in hand.values())
    return f"""    log π_old = {number(log_old, 4)}    log π = {number(log_new, 4)}    log π_ref = {number(log_ref, 4)}

    ratio     ρ = exp(log π − log π_old) = exp({number(log_new - log_old, 4)}) = {ratio}    (3)
    clipped   clip(ρ, .8, 1.2) = {clipped}
    surrogate min(ρ A, clip(ρ) A) = min({number(plain, 4)}, {number(cut, 4)}) = {surrogate}
    KL        d = log π_ref − log π = {gap},  k3 = e^d − d − 1 = {k3}    (3)
    loss      −({surrogate}) + .001 · {k3} = {loss}    (1)
    weight    1 / ({GROUP} rollouts · {tokens} tokens) = {number(1 / (GROUP * tokens), 4)}    (4)"""


def changes(episodes: Sequence[Episode], batch: Pack, old: Tensor, new: Tensor) -> list[list[object]]:
    """For each rollout its advantage, and its probability before and after the update."""
    rows: list[list[object]] = []
    for episode in episodes:
        mine = batch.episode_index == episode.sample  # (R,) bool
        before = float(old[mine].sum())
        after = float(new[mine].sum())
        rows.append([episode.sample, number(episode.advantage), f"{math.exp(before):.2g}", f"{math.exp(after):.2g}"])
        assert (after > before) == (episode.advantage > 0)
    return rows


def size(difference: float) -> str:
    return f"{difference:.0e}" if difference else "exactly 0"


def clip_sentence(ratio: float, advantage: float, clipped: int) -> str:
    active = ratio < 1 - CLIP if advantage < 0 else ratio > 1 + CLIP
    here = "one of them" if active else "not one of them"
    return f"The clip is active at {clipped} tokens, where the gradient is 0. This token is {here}."


@torch.no_grad()
def recomputed(parts: Parts, model: VLModel, batch: Pack) -> Tensor:
    """log π of the trained tokens (R,), by one forward pass over the pack."""
    features = model.encode_images(batch.images)  # (M, d)

    def head_fn(hidden: Tensor, head: Tensor) -> Tensor:
        logps, _ = log_probs(hidden[batch.logits_index], head, batch.targets, 1.0, parts.suppressed)
        return logps

    return model(batch.input_ids, batch.position_ids, batch.attention_fn, features, batch.image_index, head_fn=head_fn)


# ---- figures


def save(figure, name: str) -> None:
    FIGURES.mkdir(exist_ok=True)
    figure.savefig(FIGURES / name, bbox_inches="tight", dpi=110, metadata={"Software": None})
    plt.close(figure)


def draw_masks(episodes: Sequence[Episode]) -> None:
    longest = max(len(episode.input_ids) for episode in episodes)
    figure, axes = plt.subplots(figsize=(8, 1.6))
    for row, episode in enumerate(episodes):
        for place, mask in enumerate(episode.loss_mask):
            colour = GREY if place < episode.prompt_length else BLUE if mask else ORANGE
            axes.barh(row, 1, left=place, color=colour, edgecolor="white", linewidth=0.5)
    axes.set_xlim(0, longest)
    axes.set_yticks(range(len(episodes)), [f"rollout {episode.sample}" for episode in episodes])
    axes.invert_yaxis()
    axes.set_xlabel("token")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    save(figure, "masks.png")


def draw_slots(engine: WatchedEngine, rollout: Rollout) -> None:
    names = {sequence.key: conversation.episode.sample for sequence, conversation in rollout.conversations.items()}
    figure, axes = plt.subplots(figsize=(8, 1.6))
    for step, states in enumerate(engine.occupied):
        for slot, (_, state) in states.items():
            axes.barh(
                slot, 1, left=step, color=BLUE if state == "decodes" else ORANGE, edgecolor="white", linewidth=0.5
            )
    first = engine.occupied[0]
    axes.set_yticks(sorted(first), [f"slot {slot}: rollout {names[first[slot][0]]}" for slot in sorted(first)])
    axes.invert_yaxis()
    axes.set_xlabel("step of the engine")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    save(figure, "slots.png")


def seen_by(batch: Pack) -> np.ndarray:
    """(N, N) bool: whether a query sees a key, read off the layout that attention uses."""
    layout = batch.attention_fn
    n = len(batch.input_ids)
    seen = np.zeros((n, n), dtype=bool)
    query = key = 0
    for q_len, k_len in zip(layout.segments.q_lens, layout.segments.k_lens):
        keys = layout.gather[key : key + k_len].tolist()
        for i in range(q_len):
            seen[query + i, keys[: k_len - q_len + i + 1]] = True
        query += q_len
        key += k_len
    return seen


def draw_attention(batch: Pack) -> None:
    figure, axes = plt.subplots(figsize=(4, 4))
    axes.imshow(~seen_by(batch), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_xlabel("key")
    axes.set_ylabel("query")
    save(figure, "attention.png")


# ---- the page


def make(folder: Path) -> str:
    attention.sum_in_fp64(True)
    parts = Parts(folder)
    episodes, engine, rollout = telling(parts)
    example = episodes[0].example
    batch = pack(episodes, range(GROUP), torch.device("cpu"))
    searched = next(e for e in episodes if e.searches() and e.reward_parts["accuracy"] == 1)
    FIGURES.mkdir(exist_ok=True)
    (FIGURES / "picture.png").write_bytes(example.image)
    draw_masks(episodes)
    draw_slots(engine, rollout)
    draw_attention(batch)
    sections = [
        section_question(example),
        section_prompt(parts, episodes[0]),
        section_rollout(parts, searched),
        section_group(parts, episodes),
        section_generation(engine, rollout, episodes),
        section_pack(parts, episodes, batch),
        section_loss(parts, episodes, batch),
    ]
    attention.sum_in_fp64(False)
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:16]
    return reflowed("\n\n".join([INTRODUCTION, *sections, f"<!-- made with weights {weights} -->"])) + "\n"


INTRODUCTION = """# One question through the code

`python docs/walkthrough.py` made this page: every number is what the program computed on the toy base model (a million
parameters of the real architecture). Read it beside [the plain form](../examples/plain_grpo.py) and
[the equations](algorithm.md)."""


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser("docs/walkthrough.py", description="Write docs/walkthrough.md and its figures.")
    parser.add_argument(
        "--model", default="", help="folder of a model of the basic toy world; the base model otherwise"
    )
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    folder = Path(given.model) if given.model else base_model(World(0))
    PAGE.write_text(make(folder), encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    main(sys.argv[1:])
