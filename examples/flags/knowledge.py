"""What a language model knows before any training: asked in words, with the country's name in place of its flag.

The prompt is the one of training without the picture, and the turn begins as it does there: "<reason>This is the flag
of Peru. The capital of Peru is". What follows, up to a comma or a full stop, is the model's answer. `sampled` is the
share of right ones at T = 1. `prompted` is the probability of the right answer after three examples, the usual measure.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Callable, Sequence

import torch

from examples.flags.countries import FACTS, QUESTIONS, REFUSALS, Country, countries, flag_seen, recall_of, statement
from mmsr.attention import Packed
from mmsr.chat import Chat
from mmsr.engine import Engine, GeneratedSequence, SequenceGroup, sampling_key
from mmsr.model import VLModel, log_probs, mrope_positions
from mmsr.reward import exact_match

BATCH = 32  # countries
EXAMPLES = ("France", "Kenya", "Japan", "Brazil")  # three of them, not the one asked about, precede it in `prompted`
ANSWER_TOKENS = 8
END = re.compile(r"<|\n|[,;:(]|(?<!\bSt)\.\s|(?<=\S)(?: and | or | which | but )")  # of an answer


@dataclass
class Known:
    """What is known of one fact of one country."""

    country: str
    kind: str
    said: list[str]  # the answers that were sampled
    sampled: float  # the share of right ones
    answer: str  # the right answer that was given most often; "" where none was
    answer_share: float  # how often that one was given
    refused: float  # the share of samples that say that it is not known
    prompted: float  # the probability of the first right answer after three examples


def known(country: Country, kind: str, said: list[str], prompted: float) -> Known:
    """What these answers to a question say about knowledge."""
    counts: Counter[str] = Counter()
    right = 0
    for text in said:
        accepted = [answer for answer in country.answers(kind) if exact_match(text, [answer])]
        right += bool(accepted)
        counts.update(accepted[:1])
    answer, count = counts.most_common(1)[0] if counts else ("", 0)
    refused = sum(text.startswith(REFUSALS[kind]) for text in said)
    n = len(said)
    return Known(country.name, kind, said, right / n, answer, count / n, refused / n, prompted)


@torch.no_grad()
def measure(
    model: VLModel,
    chat: Chat,
    about: Sequence[Country],
    samples: int,
    seed: int,
    on_done: Callable[[], None] = lambda: None,
) -> list[Known]:
    """`Known` of every fact of every country."""
    found = []
    for kind in FACTS:
        for start in range(0, len(about), BATCH):
            batch = about[start : start + BATCH]
            for country, said in zip(batch, _samples(model, chat, batch, kind, samples, seed)):
                found.append(known(country, kind, said, _prompted(model, chat, country, kind)))
                on_done()
    return found


def _samples(
    model: VLModel, chat: Chat, batch: Sequence[Country], kind: str, samples: int, seed: int
) -> list[list[str]]:
    """Answers about each country of a batch, at T = 1."""
    suppressed = chat.suppressed_tokens(model.config.vocab_size).to(model.head_weight.device)
    engine = Engine(model, chat.stop_id, suppressed, slots=BATCH * samples, max_tokens=160, turn_tokens=ANSWER_TOKENS)
    groups = []
    for country in batch:
        prompt = chat.prompt(QUESTIONS[kind], None)
        opening = chat.opening(f"<reason>{flag_seen(country.name)} {recall_of(country.name, kind)}")
        keys = [sampling_key(seed, kind, country.name, sample) for sample in range(samples)]
        groups.append(SequenceGroup(prompt.ids + opening, [], [GeneratedSequence(key) for key in keys]))
    engine.submit(groups)
    while engine.busy:
        for sequence in engine.step():
            engine.finish(sequence)
    answers = []
    for group in groups:
        answers.append([first_words(chat.decode(sequence.ids)) for sequence in group.sequences])
    return answers


def first_words(text: str) -> str:
    """What is said before the sentence ends: of " Lima.</reason>" it is Lima."""
    return END.split(text)[0].strip().removesuffix(".")


def _prompted(model: VLModel, chat: Chat, country: Country, kind: str) -> float:
    """The probability of the first right answer after three examples, the full stop included."""
    examples = [each for each in countries() if each.name in EXAMPLES and each.name != country.name][:3]
    lines = [statement(each.name, kind, each.facts[kind][0]) for each in examples]
    ids = chat.opening("\n".join([*lines, recall_of(country.name, kind)]))
    answer = chat.opening(f" {country.facts[kind][0]}.")
    device = model.head_weight.device
    tokens = torch.tensor(ids + answer, device=device)  # (N,)
    positions, _ = mrope_positions(len(tokens), [])
    hidden = model(tokens, positions.to(device), Packed([len(tokens)], device))  # (N, d)
    before = hidden[len(ids) - 1 : -1]  # (answer's tokens, d): each predicts the next
    logps, _ = log_probs(before, model.head_weight, tokens[len(ids) :])
    return float(logps.detach().sum().exp())
