"""What would go wrong hours later is refused before a weight is loaded: long prompts, another model's tokenizer."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

from mmsr.chat import ANSWER, IMAGE_PAD, VISION_END, VISION_START, Chat
from mmsr.config import EvalConfig, Options
from mmsr.episode import Example
from mmsr.model import ModelConfig
from mmsr.setup.questions import my_places
from mmsr.system.errors import UserError
from mmsr.system.parallel import Ranks
from mmsr.vision import Processor, image_tokens

WITHOUT_TOKENS = SimpleNamespace(tokens=0)  # takes the place of a picture while the words around it are counted


def check_tokens(folder: Path, chat: Chat, model: ModelConfig) -> None:
    """Raises UserError for a tokenizer of another model: the model would read its tokens as something else."""
    chat.suppressed_tokens(model.vocab_size)  # raises where the vocabulary is too small
    expected = {
        IMAGE_PAD: model.image_token_id,
        VISION_START: model.vision_start_token_id,
        VISION_END: model.vision_end_token_id,
    }
    for name, token_id in expected.items():
        if chat.added[name] != token_id:
            where = f"{name} is {chat.added[name]} in tokenizer.json and {token_id} in config.json"
            raise UserError(f"{folder}: {where}; take both from the same checkpoint")


def check_prompts(
    option: str, questions: Sequence[Example], chat: Chat, processor: Processor, config: Options, ranks: Ranks
) -> None:
    """Warn of prompts that leave no room for the shortest answer. Raises UserError where none leaves any.

    `processor`: of the model's pictures. A rollout of such a prompt ends before its first token, or within its answer.
    It teaches nothing, and would silently count as wrong.
    """
    answer = len(chat.assistant(f"<{ANSWER}></{ANSWER}>"))
    if config.turn_tokens < answer:
        raise UserError(f"--turn-tokens {config.turn_tokens}: the shortest answer takes {answer}; give more")
    shortest = math.inf
    too_long = []  # (place, id)
    with ranks.sync_errors():
        for place, example, length in prompt_lengths(questions, chat, processor, config, ranks):
            shortest = min(shortest, length)
            if length + answer > config.max_tokens:
                too_long.append((place, example.id))
    shares = ranks.all_gather((shortest, too_long))
    shortest = min(shortest for shortest, _ in shares)
    too_long = sorted(chain.from_iterable(too_long for _, too_long in shares))
    if not too_long:
        return
    fit = f"fit --max-tokens {config.max_tokens} with a picture and an answer of {answer} tokens"
    mend = "raise --max-tokens, lower --max-pixels, or shorten the prompt"
    if len(too_long) == len(questions):
        raise UserError(f"{option}: no prompt can {fit}; the shortest takes {shortest}; {mend}")
    if ranks.main:
        ids = ", ".join(name for _, name in too_long[:5])
        if len(too_long) > 5:
            ids += ", …"
        some = f"{len(too_long)} of {len(questions)} prompts do not"
        consequence = "they cannot be answered and count as wrong"
        print(f"WARNING: {option}: {some} {fit}: {consequence} ({ids}); {mend}", file=sys.stderr)


def prompt_lengths(
    questions: Sequence[Example], chat: Chat, processor: Processor, config: Options, ranks: Ranks
) -> Iterator[tuple[int, Example, int]]:
    """(place, question, tokens of its prompt) of this rank's share. No picture is decoded: its header has its size."""
    direct = isinstance(config, EvalConfig) and config.mode == "direct"

    @cache
    def tokens_of_words(question: str) -> int:
        return len(chat.prompt(question, WITHOUT_TOKENS, direct).ids)

    for place in my_places(len(questions), ranks, "measuring prompts", "prompt"):
        example = questions[place]
        picture = image_tokens(example.image, config.min_pixels, config.max_pixels, processor)
        yield place, example, tokens_of_words(example.question) + picture
