"""Every figure that needs a GPU, in one command of less than nine minutes, on random weights of the real shapes.

    python bench/run_gpu.py                      # 3B and 7B, on the first GPU
    python bench/run_gpu.py --shapes 3B
    python bench/run_gpu.py --device cpu --tiny  # does every row still run? its figures mean nothing

Copy bandwidth and matrix peak are measured first, because every other row is given as a share of what they allow. A row
that does not fit the memory, fails, or finds no time left says so and gives no figure. Speeds are medians of three
runs, but for the whole step. No KL reference anywhere.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Callable

import common
import torch
from torch import Tensor

from mmsr import attention, model
from mmsr.engine import Engine, Group, Member, sampling_key
from mmsr.episode import Episode, Example, UserError, first_line
from mmsr.graphs import WARM_UPS
from mmsr.model import ModelConfig
from mmsr.optimizer import MasterWeights
from mmsr.pack import cut, pack
from mmsr.parallel import start
from mmsr.update import ImageFeatures, Trainer
from mmsr.vision import PATCH_VALUES, Image, VisionConfig

SECONDS = 8.5 * 60
TEXT = dict(rms_norm_eps=1e-6, mrope_section=(16, 24, 24))
SHAPES = {
    "3B": ModelConfig(
        vocab_size=151936, hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16,
        num_key_value_heads=2, tie_word_embeddings=True, vision=VisionConfig(out_hidden_size=2048), **TEXT,
    ),
    "7B": ModelConfig(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, vision=VisionConfig(out_hidden_size=3584), **TEXT,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """Of one step, as in the goals: a prompt with a picture, a turn, a search's result, a turn."""

    questions: int = 32
    group: int = 4
    prompt: int = 1024
    picture: int = 32  # patches along a side: 448 pixels, 256 tokens
    turn: int = 125
    result: int = 400
    thumbnails: int = 5
    thumbnail: int = 8  # patches along a side
    decode_batch: int = 128
    decode_steps: int = 64
    matrix: int = 8192

    @classmethod
    def tiny(cls) -> Sizes:
        return cls(2, 2, 40, 4, 6, 20, 2, 4, decode_batch=8, decode_steps=4, matrix=256)


class Bench:
    """The rows, and what they share. `rows` grows by (what, figure, share of the limit, remark)."""

    def __init__(self, device: torch.device, sizes: Sizes, dtype: torch.dtype):
        self.device, self.sizes, self.dtype = device, sizes, dtype
        self.rows: list[tuple[str, ...]] = []
        self.end = time.monotonic() + SECONDS

    def row(self, what: str, needs: float, work: Callable[[], tuple[str, str, str]]) -> None:
        """Run one row unless fewer than `needs` seconds are left."""
        left = self.end - time.monotonic()
        if left < needs:
            found = ("not measured", "", f"{left:.0f} s left, {needs:.0f} s needed")
        else:
            try:
                found = work()
            except (torch.OutOfMemoryError, UserError):  # the latter from the trainer, which has tried smaller pieces
                found = ("not measured", "", "does not fit this memory")
            except Exception as error:  # the other rows are worth their minutes
                found = ("not measured", "", f"failed: {type(error).__name__}: {first_line(error)}")
        self.rows.append((what, *found))
        print(" | ".join(self.rows[-1]), flush=True)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def median(self, work: Callable[[], object], runs: int = 3) -> float:
        return statistics.median(common.timed(work, self.device)[0] for _ in range(runs))

    # ---- what the machine can do

    def bandwidth(self) -> tuple[str, str, str]:
        source = torch.empty(2 * self.sizes.matrix**2 * 16, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        target.copy_(source)
        self.bytes = 2 * source.nbytes / self.median(lambda: target.copy_(source))
        return f"{self.bytes / 1e12:.2f} TB/s", "", "read and write"

    def peak(self) -> tuple[str, str, str]:
        n = self.sizes.matrix
        a, b = (torch.randn(n, n, device=self.device, dtype=self.dtype) for _ in "ab")
        a @ b
        self.flops = 2 * n**3 / self.median(lambda: a @ b)
        return f"{self.flops / 1e12:.0f} TFLOP/s", "", f"{str(self.dtype).removeprefix('torch.')}, {n}³"

    # ---- material

    def image(self, side: int, seed: int) -> Image:
        generator = torch.Generator().manual_seed(seed)
        return Image(torch.randn(side * side, PATCH_VALUES, generator=generator), (side, side), f"{side}/{seed}")

    def stretch(self, config: ModelConfig, length: int, images: list[Image], seed: int):
        """Random ids with the images' placeholders among them, and where those are."""
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, config.vocab_size // 2, (length,), generator=generator).tolist()
        at, placed = 4, []
        for image in images:
            ids[at : at + image.tokens] = [config.image_token_id] * image.tokens
            placed.append((at, image))
            at += image.tokens + 2
        assert at <= length == len(ids)
        return ids, placed

    def prompt(self, config: ModelConfig, seed: int):
        return self.stretch(config, self.sizes.prompt, [self.image(self.sizes.picture, seed)], seed)

    def result(self, config: ModelConfig, seed: int):
        thumbnails = [self.image(self.sizes.thumbnail, 1000 + 10 * seed + i) for i in range(self.sizes.thumbnails)]
        return self.stretch(config, self.sizes.result, thumbnails, 500 + seed)

    def banned(self, config: ModelConfig) -> Tensor:
        banned = torch.zeros(config.vocab_size, dtype=torch.bool, device=self.device)
        banned[config.vocab_size // 2 :] = True  # with the stop id and the placeholders
        return banned

    def groups(self, config: ModelConfig, prompts: int, members: int) -> list[Group]:
        made = []
        for number in range(prompts):
            ids, images = self.prompt(config, number)
            made.append(Group(ids, images, [Member(sampling_key(number, i)) for i in range(members)]))
        return made

    def engine(self, policy, slots: int, turn: int, capture: bool = True) -> Engine:
        s = self.sizes
        most = s.prompt + s.result + 4 * turn + 8
        return Engine(
            policy, policy.config.eos_token_id, self.banned(policy.config), slots=slots, max_tokens=most,
            turn_tokens=turn, capture=capture,
        )  # fmt: skip

    # ---- rows of one shape

    def decode(self, policy, prompts: int, members: int, capture: bool = True) -> tuple[str, str, str]:
        """Decode steps alone, prompts prefilled, against the bytes that a step has to read.

        The steps in which the cache grows fast are left out; later captures, one in 64 steps, are a part of decoding.
        """
        n, runs = self.sizes.decode_steps, 3
        warm = WARM_UPS + 2 if self.device.type == "cuda" else 1
        engine = self.engine(policy, prompts * members, warm + runs * n + 2, capture)
        groups = self.groups(policy.config, prompts, members)
        engine.submit(groups)
        while engine.queue:
            engine.step()
        for _ in range(warm):
            engine.step()
        seconds = self.median(lambda: [engine.step() for _ in range(n)], runs)
        config, size = policy.config, self.dtype.itemsize
        weights = sum(p.numel() for p in policy.model.layers.parameters()) + policy.head_weight.numel()
        per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        limit = (weights + per_token * prompts * self.sizes.prompt) * size / self.bytes
        speed = prompts * members * n / seconds
        return f"{speed:,.0f} tok/s", f"{limit * n / seconds:.0%}", f"{1000 * seconds / n:.1f} ms a step"

    def their_decode(self, config: ModelConfig, static: bool) -> tuple[str, str, str]:
        """transformers' generate: two lengths, and the difference is decoding."""
        twin, batch, n = self.twin(config), self.sizes.decode_batch, self.sizes.decode_steps
        ids = torch.randint(0, config.vocab_size // 2, (batch, self.sizes.prompt), device=self.device)

        def generate(steps: int) -> None:
            options = {"cache_implementation": "static"} if static else {}
            twin.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=steps, min_new_tokens=steps,
                do_sample=False, pad_token_id=0, **options,
            )  # fmt: skip

        generate(2 * n if static else 8)  # compiles; loads kernels and takes memory
        short, long = (self.median(partial(generate, steps)) for steps in (n // 2, n + n // 2))
        seconds = max(long - short, 1e-9)
        how = "static cache, compiled" if static else "dynamic cache"
        return f"{batch * n / seconds:,.0f} tok/s", "", f"{how}, {1000 * seconds / n:.1f} ms a step"

    def twin(self, config: ModelConfig):
        import transformers

        transformers.utils.logging.set_verbosity_error()
        default = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with self.device:
                kind = transformers.Qwen2_5_VLForConditionalGeneration
                return kind(transformers.Qwen2_5_VLConfig(**config.to_dict()))
        finally:
            torch.set_default_dtype(default)

    def episodes(self, config: ModelConfig, questions: int) -> list[Episode]:
        """Scored episodes of random tokens."""
        made, s = [], self.sizes
        for group in range(questions):
            prompt, picture = self.prompt(config, group)
            back, thumbnails = self.result(config, group)
            for member in range(s.group):
                said = [self.stretch(config, s.turn, [], 10_000 + 100 * group + 2 * member + i)[0] for i in (0, 1)]
                ids = [*prompt, *said[0], *back, *said[1]]
                mask = [0] * s.prompt + [1] * s.turn + [0] * s.result + [1] * s.turn
                images = picture + [(s.prompt + s.turn + at, image) for at, image in thumbnails]
                episode = Episode(
                    Example("", b"", "", ()), group, member, ids, mask, [0.0] * len(ids), images, s.prompt
                )
                episode.advantage = float((-1) ** member)
                made.append(episode)
        return made

    def train(self, policy, questions: int, recompute: bool) -> tuple[str, str, str]:
        """One update, optimizer included: real (unique) tokens, and their floating-point operations of the peak."""
        policy.checkpoint_blocks = policy.visual.checkpoint_blocks = recompute
        trainer = Trainer(policy, self.optimizer(policy), self.banned(policy.config), micro_tokens=16384)
        batch = self.episodes(policy.config, questions)
        trainer.step([batch], 0.0)  # makes the optimizer's moments
        tried = 0
        while tried != trainer.micro_tokens:  # until it knows what fits beside them
            tried = trainer.micro_tokens
            update = trainer.step([batch], 0.0)
        seconds = self.median(lambda: trainer.step([batch], 0.0))
        assert update["skipped_updates"] == 0
        share = self.operations(policy, batch, update["trained"]) / seconds / self.flops
        held = ""
        if self.device.type == "cuda":
            held = f", {torch.cuda.max_memory_allocated() / 2**30:.0f} GiB at most"
        return f"{update['trained'] / seconds:,.0f} tok/s", f"{share:.0%}", f"{seconds:.2f} s an update{held}"

    def optimizer(self, policy) -> MasterWeights:
        return MasterWeights(policy, lambda p: torch.optim.AdamW(p, lr=0.0, weight_decay=0.0, fused=True))

    def operations(self, policy, batch: list[Episode], tokens: int) -> float:
        """Forward and backward, without what is computed again; the tower's attention is left out."""
        config, s = policy.config, self.sizes
        linear = sum(p.numel() for p in policy.model.layers.parameters())
        suffix = 2 * s.turn + s.result
        pairs = len(batch) * suffix * (s.prompt + suffix / 2) + len(batch) / s.group * s.prompt**2 / 2
        attended = 2 * pairs * config.num_hidden_layers * config.hidden_size
        head = len(batch) * 2 * s.turn * policy.head_weight.numel()
        images = {image.key: image for e in batch for _, image in e.images}.values()
        patches = sum(image.grid[0] * image.grid[1] for image in images)
        vision = patches * sum(p.numel() for p in policy.visual.blocks.parameters())
        return 6 * (linear * tokens + attended + head + vision)

    def their_training(self, config: ModelConfig, questions: int) -> tuple[str, str, str]:
        """transformers' model on padded text of the same lengths, a group at a time, with gradient checkpointing."""
        twin, s = self.twin(config), self.sizes
        twin.gradient_checkpointing_enable()
        twin.train()
        length = s.prompt + 2 * s.turn + s.result
        ids = torch.randint(0, config.vocab_size // 2, (s.group, length), device=self.device)
        labels = ids.clone()
        labels[:, : s.prompt] = -100
        labels[:, s.prompt + s.turn : -s.turn] = -100

        def update() -> None:
            for _ in range(questions):
                twin(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss.backward()
            twin.zero_grad(set_to_none=True)

        update()
        seconds = self.median(update)
        unique = questions * (s.prompt + s.group * (length - s.prompt))
        return f"{unique / seconds:,.0f} tok/s", "", "unique tokens; padded, recompute, no pictures, no optimizer"

    def step(self, policy) -> tuple[str, str, str]:
        """A whole step: rollout with one search an episode, then one update."""
        s, config = self.sizes, policy.config
        policy.checkpoint_blocks = policy.visual.checkpoint_blocks = True
        trainer = Trainer(policy, self.optimizer(policy), self.banned(config), micro_tokens=16384)

        groups = self.groups(config, s.questions, s.group)
        results = {id(group): self.result(config, number) for number, group in enumerate(groups)}

        def roll() -> list[Episode]:
            engine = self.engine(policy, s.questions * s.group, s.turn)
            engine.submit(groups)
            while engine.busy:
                for member in engine.step():
                    if 0 in member.loss_mask:
                        engine.finish(member)
                    else:
                        engine.extend(member, *results[id(member.group)])
            return [
                self.finished(group, i, m, j) for i, group in enumerate(groups) for j, m in enumerate(group.members)
            ]

        rollout, episodes = common.timed(roll, self.device)
        update, _ = common.timed(lambda: trainer.step([episodes], 0.0), self.device)
        what = f"{s.questions} × {s.group}: rollout {rollout:.1f} s, update {update:.1f} s"
        return f"{rollout + update:.1f} s", "", what

    def finished(self, group: Group, number: int, member: Member, sample: int) -> Episode:
        n = len(group.ids)
        lists = (group.ids + member.ids, [0] * n + member.loss_mask, [0.0] * n + member.logps)
        images = group.images + [(n + at, image) for at, image in member.images]
        episode = Episode(Example("", b"", "", ()), number, sample, *lists, images, n)
        episode.advantage = float((-1) ** sample)
        return episode

    def gap(self, policy) -> tuple[str, str, str]:
        """|log p while sampling − log p in training| of the tokens of one group."""
        engine = self.engine(policy, self.sizes.group, self.sizes.turn)
        (group,) = groups = self.groups(policy.config, 1, self.sizes.group)
        engine.submit(groups)
        while engine.busy:
            for member in engine.step():
                engine.finish(member)
        episodes = [self.finished(group, 0, member, i) for i, member in enumerate(group.members)]
        trainer = Trainer(policy, None, self.banned(policy.config))
        batch = pack(episodes, cut(episodes, 10**6)[0], self.device)
        with torch.no_grad():
            logps, _ = trainer.log_probs(policy, batch, ImageFeatures(policy, batch.images, False))
        gap = (logps - batch.sampled_logps).abs()
        return f"{gap.mean():.1e}", "", f"largest {gap.max():.1e}; {attention.backend(policy.head_weight)} kernels"

    def memory(self, policy) -> tuple[str, str, str]:
        """What an optimizer holds for each parameter, after a step."""
        before = torch.cuda.memory_allocated() if self.device.type == "cuda" else 0
        optimizer = self.optimizer(policy)
        optimizer.make_state()
        n = sum(p.numel() for p in policy.parameters())
        tensors = sum(t.nbytes for t in optimizer.tensors().values()) / n
        held = (torch.cuda.memory_allocated() - before) / n if self.device.type == "cuda" else tensors
        weight = self.dtype.itemsize
        return f"{weight + held:.2f} B", "", f"without gradient; that takes {weight}, or 4 with several micro-batches"

    def shape(self, name: str, config: ModelConfig) -> None:
        s = self.sizes

        def with_policy(work, *args) -> tuple[str, str, str]:
            return work(model.random_model(config, 0, self.dtype, self.device), *args)

        groups, members = s.decode_batch // 8, 8
        rows = [
            (f"decode, {groups} prompts × {members}", 30, partial(with_policy, self.decode, groups, members)),
            (f"decode, {s.decode_batch} prompts × 1", 30, partial(with_policy, self.decode, s.decode_batch, 1)),
            (
                f"decode, {groups} prompts × {members}, not captured",
                30,
                partial(with_policy, self.decode, groups, members, False),
            ),
            ("decode, transformers", 40, partial(self.their_decode, config, False)),
            ("gap between sampler and trainer", 15, partial(with_policy, self.gap)),
            ("memory a parameter", 15, partial(with_policy, self.memory)),
            ("training, blocks kept", 40, partial(with_policy, self.train, 4, False)),
            ("training, blocks recomputed", 40, partial(with_policy, self.train, 4, True)),
            ("training, transformers", 40, partial(self.their_training, config, 4)),
            ("whole step", 90, partial(with_policy, self.step)),
        ]
        for what, needs, work in rows:
            self.row(f"{name}: {what}", needs, work)

    def compiled(self, name: str, config: ModelConfig) -> None:
        self.row(f"{name}: decode, transformers, compiled", 150, partial(self.their_decode, config, True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shapes", default="7B,3B")
    parser.add_argument("--tiny", action="store_true", help="a smoke test: a tiny shape and tiny sizes")
    options = parser.parse_args()
    shapes = {name: SHAPES[name] for name in options.shapes.split(",")}
    if options.tiny:
        vision = VisionConfig(
            depth=2, hidden_size=32, num_heads=2, intermediate_size=44, out_hidden_size=64, fullatt_block_indexes=(1,)
        )
        small = dict(vocab_size=400, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
        ids = dict(bos_token_id=390, eos_token_id=391, image_token_id=392, video_token_id=393)
        ids |= dict(vision_start_token_id=394, vision_end_token_id=395)
        more = dict(num_key_value_heads=2, mrope_section=(2, 3, 3), vision=vision)
        shapes = {"tiny": replace(SHAPES["7B"], **small, **more, **ids)}
    with start(options.device) as ranks:
        measure(Bench(ranks.device, Sizes.tiny() if options.tiny else Sizes(), torch.bfloat16), shapes)


def measure(bench: Bench, shapes: dict[str, ModelConfig]) -> None:
    print(common.machine(bench.device), flush=True)
    try:
        bench.row("copy bandwidth", 5, bench.bandwidth)
        bench.row("matrix peak", 5, bench.peak)
        for name, config in shapes.items():
            bench.shape(name, config)
        for name, config in shapes.items():
            if bench.device.type == "cuda":
                bench.compiled(name, config)
    finally:
        print("\nno KL reference\n\n" + common.table(["row", "figure", "of the limit", "remark"], bench.rows))


if __name__ == "__main__":
    main()
