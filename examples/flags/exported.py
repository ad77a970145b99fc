"""The trained model in another program: `transformers` opens its folder and gives the same answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from examples.flags.pictures import HEIGHT, WIDTH
from mmsr.chat import Chat, Piece
from mmsr.engine import Engine, GeneratedSequence, SequenceGroup
from mmsr.pretrained.load import load
from mmsr.vision import load_image

TURN_TOKENS = 48


def first_turns(folder: Path, chat: Chat, rows: Sequence[dict[str, Any]], data: Path) -> list[tuple[str, str]]:
    """The first turn about each question, greedy and in fp32: ours, and that of `transformers`."""
    prompts = []
    for row in rows:
        picture = load_image((data / row["image"]).read_bytes(), HEIGHT * WIDTH, HEIGHT * WIDTH)
        prompts.append(chat.prompt(row["question"], picture))
    model = load(folder)
    suppressed = chat.suppressed_tokens(model.config.vocab_size)  # (V,)
    our_turns = ours(model, chat, suppressed, prompts)
    their_turns = theirs(folder, chat, suppressed, prompts)
    return [(chat.decode(a), chat.decode(b)) for a, b in zip(our_turns, their_turns)]


def ours(model, chat: Chat, suppressed: torch.Tensor, prompts: Sequence[Piece]) -> list[list[int]]:
    engine = Engine(
        model,
        chat.stop_id,
        suppressed,
        slots=len(prompts),
        max_tokens=256,
        turn_tokens=TURN_TOKENS,
        temperature=0,
    )
    sequences = [GeneratedSequence(0) for _ in prompts]
    groups = []
    for prompt, sequence in zip(prompts, sequences):
        groups.append(SequenceGroup(prompt.ids, prompt.images, [sequence]))
    engine.submit(groups)
    while engine.busy:
        for sequence in engine.step():
            engine.finish(sequence)
    return [sequence.ids for sequence in sequences]


@torch.inference_mode()
def theirs(folder: Path, chat: Chat, suppressed: torch.Tensor, prompts: Sequence[Piece]) -> list[list[int]]:
    from transformers import Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    turns = []
    for prompt in prompts:
        ids = torch.tensor([prompt.ids])  # (1, N)
        picture = prompt.images[0][1]
        said = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == model.config.image_token_id).long(),
            pixel_values=picture.patches,
            image_grid_thw=torch.tensor([(1, *picture.grid)]),
            do_sample=False,
            max_new_tokens=TURN_TOKENS,
            eos_token_id=chat.stop_id,
            pad_token_id=chat.stop_id,
            suppress_tokens=suppressed.nonzero()[:, 0].tolist(),
        )
        turns.append(said[0, len(prompt.ids) :].tolist())
    return turns
