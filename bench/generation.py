"""Generation against transformers' `generate`: the same tiny model, prompts and greedy tokens.

    python bench/generation.py --runs 3

Every prompt has its own picture. `generate` runs as for speed: one padded batch, a dynamic cache, scaled-dot-product
attention. In the rows with groups it gets each prompt once for every sequence of the group, as from a GRPO trainer; our
engine prefills it once. Stop ids are suppressed, so both generate the same number of tokens.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from functools import partial
from pathlib import Path

import common
import torch
import transformers

from mmsr import model
from mmsr.chat import PROMPTS, Chat
from mmsr.engine import Engine, GeneratedSequence, SequenceGroup
from mmsr.pretrained.save import save
from mmsr.toy.base import build_tokenizer
from mmsr.vision import load_image


class Bench:
    def __init__(self, folder: Path, side: int, new_tokens: int):
        tokenizer = build_tokenizer()
        tokenizer.save(str(folder / "tokenizer.json"))
        self.ours = model.random_model(common.tiny_config(tokenizer), seed=0)
        save(self.ours, folder)
        self.theirs = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        chat = Chat(folder, PROMPTS / "toy", [])
        self.chat, self.side, self.new_tokens = chat, side, new_tokens
        self.suppressed = chat.suppressed_tokens(self.ours.config.vocab_size)
        self.suppressed[chat.stop_id] = True

    def prompts(self, n: int) -> list:
        pictures = [load_image(common.picture(self.side, seed=i)) for i in range(n)]
        return [self.chat.prompt("who made this ?", picture) for picture in pictures]

    def run_ours(self, prompts: list, sequences: int) -> list[list[int]]:
        groups = []
        for prompt in prompts:
            generated = [GeneratedSequence(i) for i in range(sequences)]
            groups.append(SequenceGroup(prompt.ids, prompt.images, generated))
        engine = Engine(
            self.ours,
            self.chat.stop_id,
            self.suppressed,
            slots=len(prompts) * sequences,
            max_tokens=len(prompts[0].ids) + self.new_tokens,
            turn_tokens=self.new_tokens,
            temperature=0,
        )
        engine.submit(groups)
        while engine.busy:
            for sequence in engine.step():
                engine.finish(sequence)
        return [sequence.ids for group in groups for sequence in group.sequences]

    @torch.no_grad()
    def run_theirs(self, prompts: list, sequences: int) -> list[list[int]]:
        every = [prompt for prompt in prompts for _ in range(sequences)]
        ids = torch.tensor([prompt.ids for prompt in every])  # of equal length: no padding
        images = [image for prompt in every for _, image in prompt.images]
        out = self.theirs.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == self.ours.config.image_token_id).long(),
            pixel_values=torch.cat([image.patches for image in images]),
            image_grid_thw=torch.tensor([(1, *image.grid) for image in images]),
            max_new_tokens=self.new_tokens,
            do_sample=False,
            suppress_tokens=self.suppressed.nonzero()[:, 0].tolist(),
            pad_token_id=0,
        )
        return out[:, ids.shape[1] :].tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--side", type=int, default=112, help="pixels along a picture's side")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--batches", default="32x1,256x1,32x8", help="prompts x sequences, by commas")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), options.side, options.new_tokens)
        for batch in options.batches.split(","):
            n, sequences = map(int, batch.split("x"))
            prompts = bench.prompts(n)
            theirs = [common.timed(partial(bench.run_theirs, prompts, sequences)) for _ in range(options.runs)]
            ours = [common.timed(partial(bench.run_ours, prompts, sequences)) for _ in range(options.runs)]
            same = sum(a == b for a, b in zip(ours[-1][1], theirs[-1][1]))
            (their_seconds, _), (our_seconds, _) = zip(*theirs), zip(*ours)
            ratio = statistics.median(their_seconds) / statistics.median(our_seconds)
            speed = n * sequences * options.new_tokens / statistics.median(our_seconds)
            rows.append([
                f"{n} × {sequences}", common.spread(their_seconds), common.spread(our_seconds), f"{ratio:.1f}",
                f"{speed:,.0f}", f"{same} of {n * sequences}",
            ])  # fmt: skip
    print(common.machine())
    length = len(prompts[0].ids)
    print(f"fp32, greedy, prompts of {length} tokens with a picture, {options.new_tokens} new; {options.runs} runs\n")
    header = ["prompts × sequences", "generate, s", "mmsr, s", "ratio", "mmsr, tokens/s", "sequences equal"]
    print(common.table(header, rows))


if __name__ == "__main__":
    main()
