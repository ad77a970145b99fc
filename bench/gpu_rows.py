"""What `gpu_day.py` measures: the rows that need a GPU, on random weights of the real shapes.

`gpu_day.py` starts this file as a child process, gives it the name of one row a line and gets that row's figures back.
Speeds are medians of three runs, but for the whole step. Rows by LoRA have a KL reference, the others none. Every row
makes its own model, so that no row depends on what another left behind.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import traceback
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Callable, Iterable, Iterator
from unittest.mock import patch

import common
import torch
from torch import Tensor

from mmsr import attention, lora, model, plan
from mmsr.config import Config
from mmsr.engine import Engine, GeneratedSequence, SequenceGroup, sampling_key
from mmsr.episode import Episode, Example
from mmsr.model import ModelConfig, VLModel
from mmsr.pack import pack, split_into_micro_batches
from mmsr.pretrained.published import SIZES
from mmsr.qwen3_vl import Qwen3VisionConfig, Qwen3VLConfig
from mmsr.system.errors import UserError, first_line
from mmsr.system.optimizer import MasterWeights
from mmsr.system.parallel import distributed
from mmsr.update import ImageFeatures, Trainer
from mmsr.vision import MERGE, Image, VisionConfig

GIB = 2**30
MICRO_TOKENS = (16384, 8192, 4096, 2048)  # of a micro-batch: the first whose memory plan fits
WARM = 140  # decode steps before the clock starts: kernels are loaded and graphs captured by then
SHAPES = {
    "3B": SIZES["Qwen2.5-VL-3B"],
    "7B": SIZES["Qwen2.5-VL-7B"],
    "Q3-2B": SIZES["Qwen3-VL-2B"],
    "Q3-4B": SIZES["Qwen3-VL-4B"],
    "Q3-8B": SIZES["Qwen3-VL-8B"],
}
KL = 0.001  # β of rows by LoRA


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

    @property
    def most(self) -> int:
        """Tokens of a conversation, and some to spare."""
        return self.prompt + self.result + 4 * self.turn + 8

    @classmethod
    def tiny(cls) -> Sizes:
        return cls(2, 2, 40, 4, 6, 20, 2, 4, decode_batch=8, decode_steps=16, matrix=256)


def add_adapters(policy: VLModel, rank: int) -> VLModel:
    """Give the decoder's linear layers adapters of random numbers, and freeze the weights. Rank 0: leave it alone.

    B is as large as after some training. With the zeros that it begins with, adapters would do nothing.
    """
    if not rank:
        return policy
    policy.requires_grad_(False)
    layers = lora.linear_layers(policy)
    for name in lora.targeted(layers, []):
        layer = layers[name]
        a = torch.randn(rank, layer.in_features, device=layer.weight.device) / layer.in_features**0.5
        b = torch.randn(layer.out_features, rank, device=layer.weight.device) * 0.02
        lora.add_adapter(layer, a, b, Config.lora_alpha / rank)
    return policy


class LeftOut(Exception):
    """A row that is not tried, and why."""


@dataclass
class Figure:
    """One number of a row. `share`: of what bandwidth or matrix peak allow; `predicted`: in the same unit."""

    value: float | None
    unit: str
    what: str = ""  # which of the row's numbers, where it has several
    share: float | None = None
    predicted: float | None = None
    remark: str = ""


@contextmanager
def counting_graphs() -> Iterator[Counter]:
    """How many captures of CUDA graphs are started and done, and how many graphs replayed, while the block runs."""
    seen, graph = Counter(), torch.cuda.CUDAGraph

    def counting(name: str, call: Callable) -> Callable:
        def counted(self, *args, **options):
            if name == "begun":
                seen[name] += 1
            call(self, *args, **options)
            if name != "begun":
                seen[name] += 1

        return counted

    calls = {"capture_begin": "begun", "capture_end": "captured", "replay": "replayed"}
    with patch.multiple(graph, **{call: counting(name, getattr(graph, call)) for call, name in calls.items()}):
        yield seen


class Bench:
    """The rows, one method each. A row returns figures, or raises LeftOut or what went wrong."""

    def __init__(self, device: torch.device, sizes: Sizes, dtype: torch.dtype, shapes: dict[str, ModelConfig]):
        self.device, self.sizes, self.dtype, self.shapes = device, sizes, dtype, shapes
        self.cuda = device.type == "cuda"
        self.limits: dict[str, float] = {}  # bandwidth, bytes/s; matrix, FLOP/s; absent until measured
        self.graphs: Counter = Counter()  # of this row; see `counting_graphs`

    def answer(self, row: dict[str, Any]) -> dict[str, Any]:
        """Run the row {row, work, options, limits}: its figures, or the reason why there are none.

        `over` says that this process is spoilt for the next row.
        """
        self.limits, figures, reason = row["limits"], [], None
        try:
            with counting_graphs() as self.graphs:
                figures = getattr(self, row["work"])(**row["options"])
        except LeftOut as why:
            reason = str(why)
        except (torch.OutOfMemoryError, UserError) as error:  # the latter from the trainer, which tried smaller pieces
            reason = f"does not fit this memory: {first_line(error)}"
        except Exception as error:
            traceback.print_exc()
            reason = f"failed: {type(error).__name__}: {first_line(error)}"
        listed = [asdict(figure) for figure in figures]
        for figure in listed:
            if figure["predicted"] is None:
                figure["predicted"] = self._predicted(row, figure["unit"])
        return {"figures": listed, "reason": reason, "over": self._spoilt()}

    def _predicted(self, row: dict[str, Any], unit: str) -> float | None:
        """What bench/roofline.py says of a row's speed, at the rates measured here; None of any other number."""
        if unit != "tok/s" or row["work"] not in ("decode", "train") or set(self.limits) != {"bandwidth", "matrix"}:
            return None
        try:
            import roofline  # which imports this file

            config = self.shapes[row["options"]["shape"]]
            return roofline.tokens_a_second(row["work"], row["options"], config, self.sizes, self.limits)
        except Exception:  # a measured figure is worth more than its prediction
            traceback.print_exc()
            return None

    def _spoilt(self) -> bool:
        """Clear the device's memory. Whether it no longer answers, or something holds memory still.

        A capture that failed spoils the process too: torch's own random numbers are refused after it.
        """
        gc.collect()
        if not self.cuda:
            return False
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated() > GIB or self.graphs["begun"] > self.graphs["captured"]
        except RuntimeError:
            traceback.print_exc()
            return True

    def median(self, work: Callable[[], object], runs: int = 3) -> float:
        return statistics.median(common.timed(work, self.device)[0] for _ in range(runs))

    def policy(self, shape: str, rank: int = 0) -> VLModel:
        """A model to train: all of its weights, or with a `rank` adapters beside them."""
        return add_adapters(model.random_model(self.shapes[shape], 0, self.dtype, self.device), rank)

    def sampler(self, policy: VLModel) -> VLModel:
        return lora.for_sampling(policy, policy, self.dtype)

    # ---- what the machine can do

    def bandwidth(self) -> list[Figure]:
        source = torch.empty(2 * self.sizes.matrix**2 * 16, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        target.copy_(source)
        speed = 2 * source.nbytes / self.median(lambda: target.copy_(source))
        return [Figure(speed / 1e12, "TB/s", remark="read and write")]

    def matrix(self) -> list[Figure]:
        n = self.sizes.matrix
        a, b = (torch.randn(n, n, device=self.device, dtype=self.dtype) for _ in "ab")
        a @ b
        speed = 2 * n**3 / self.median(lambda: a @ b)
        return [Figure(speed / 1e12, "TFLOP/s", remark=f"{str(self.dtype).removeprefix('torch.')}, {n}³")]

    def share(self, limit: str, needed: float, seconds: float) -> float | None:
        """`needed` bytes or operations in `seconds`, of what the machine can do; None where that was not measured."""
        return needed / seconds / self.limits[limit] if limit in self.limits else None

    # ---- what fits

    def memory_plan(self, shape: str, questions: int, micro_tokens: int, recompute: bool, rank: int = 0) -> plan.Plan:
        """Of a run that does what the rows do. What the plan has to assume is put as it is here."""
        s, merged = self.sizes, MERGE**2
        patch_side = self.shapes[shape].vision.processor.patch
        pixels = (s.picture * patch_side) ** 2
        c = Config(
            questions=questions, mini_batch=questions, group_size=s.group, slots=questions * s.group,
            kl=KL if rank else 0.0, lora=rank, max_tokens=s.most, turn_tokens=s.turn, min_pixels=pixels,
            max_pixels=pixels, eval_size=1, micro_tokens=micro_tokens, recompute=recompute,
        )  # fmt: skip
        known = dict(PROMPT_TEXT=s.prompt - s.picture**2 // merged, RESPONSE=2 * s.turn + s.result)
        known |= dict(THUMBNAILS=s.thumbnails, THUMBNAIL_PIXELS=(s.thumbnail * patch_side) ** 2)
        with patch.multiple(plan, create=True, **known):
            return plan.plan(self.shapes[shape], c, item=self.dtype.itemsize)

    @property
    def usable(self) -> float:
        """Bytes of the device's memory that a plan may take."""
        total = torch.cuda.get_device_properties(self.device).total_memory if self.cuda else float("inf")
        return plan.USABLE * total

    def check(self, need: float, what: str) -> None:
        """Raises LeftOut where `need` bytes do not fit."""
        if need > self.usable:
            raise LeftOut(f"{what} takes {need / GIB:.0f} GiB, {self.usable / GIB:.0f} are usable here")

    def micro_tokens(self, shape: str, questions: int, recompute: bool, optimizer: bool = True, rank: int = 0) -> int:
        """The longest micro-batch that fits by the memory plan. Raises LeftOut where none does."""
        for tokens in MICRO_TOKENS:
            rows = self.memory_plan(shape, questions, tokens, recompute, rank).rows
            absent = () if optimizer else ("rest of the masters", "optimizer moments")
            need = plan.Plan({name: row for name, row in rows.items() if name not in absent}).peak
            if need <= self.usable:
                return tokens
        self.check(need, f"by the memory plan, micro-batches of {tokens:,} tokens, it")
        raise AssertionError("it fits")

    # ---- material

    def image(self, config: ModelConfig, side: int, seed: int) -> Image:
        generator = torch.Generator().manual_seed(seed)
        patches = torch.randn(side * side, config.vision.processor.patch_values, generator=generator)
        return Image(patches, (side, side), f"{side}/{seed}")

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
        return self.stretch(config, self.sizes.prompt, [self.image(config, self.sizes.picture, seed)], seed)

    def result(self, config: ModelConfig, seed: int):
        side, count = self.sizes.thumbnail, self.sizes.thumbnails
        thumbnails = [self.image(config, side, 1000 + 10 * seed + i) for i in range(count)]
        return self.stretch(config, self.sizes.result, thumbnails, 500 + seed)

    def suppressed(self, config: ModelConfig) -> Tensor:
        suppressed = torch.zeros(config.vocab_size, dtype=torch.bool, device=self.device)
        suppressed[config.vocab_size // 2 :] = True  # with the stop id and the placeholders
        return suppressed

    def groups(self, config: ModelConfig, prompts: int, sequences: int) -> list[SequenceGroup]:
        made = []
        for number in range(prompts):
            ids, images = self.prompt(config, number)
            generated = [GeneratedSequence(sampling_key(number, i)) for i in range(sequences)]
            made.append(SequenceGroup(ids, images, generated))
        return made

    def engine(self, sampler: VLModel, slots: int, turn: int, most: int, **options: Any) -> Engine:
        limits = dict(slots=slots, max_tokens=most, turn_tokens=turn)
        return Engine(sampler, sampler.config.eos_token_id, self.suppressed(sampler.config), **limits, **options)

    # ---- generation

    def decode(self, shape: str, sequences: int, capture: bool, rank: int = 0) -> list[Figure]:
        """Decode steps alone, prompts prefilled, against the bytes that a step has to read."""
        n, runs, s = self.sizes.decode_steps, 3, self.sizes
        sampler, prompts = self.sampler(self.policy(shape, rank)), s.decode_batch // sequences
        turn = (WARM if self.cuda else 1) + runs * n + prompts + 2  # no turn ends before the clock stops
        engine = self.engine(sampler, prompts * sequences, turn, s.prompt + turn + 1, capture=capture)
        engine.submit(self.groups(sampler.config, prompts, sequences))
        while engine.counts["prefilled"] < prompts * s.prompt:
            engine.step()
        for _ in range(WARM if self.cuda else 1):
            engine.step()
        before = self.graphs["replayed"]
        seconds = self.median(lambda: [engine.step() for _ in range(n)], runs)
        share = self.share("bandwidth", self.decode_bytes(sampler, prompts * s.prompt) * n, seconds)
        replayed = (self.graphs["replayed"] - before) / runs / n
        remark = f"{1000 * seconds / n:.1f} ms a step, {replayed:.0%} of them replayed"
        return [Figure(prompts * sequences * n / seconds, "tok/s", share=share, remark=remark)]

    def decode_bytes(self, sampler: VLModel, tokens: float) -> float:
        """What a decode step has to read: the decoder's weights, and the keys and values of `tokens` tokens."""
        config = sampler.config
        weights = sum(p.numel() for p in sampler.model.layers.parameters()) + sampler.head_weight.numel()
        per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        return (weights + per_token * tokens) * self.dtype.itemsize

    def their_decode(self, shape: str, static: bool) -> list[Figure]:
        """transformers' generate: two lengths, and the difference is decoding."""
        config, batch, n = self.shapes[shape], self.sizes.decode_batch, self.sizes.decode_steps
        twin = self.twin(config)
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
        how = f"static cache{', compiled' if self.cuda else ''}" if static else "dynamic cache"
        return [Figure(batch * n / seconds, "tok/s", remark=f"{how}, {1000 * seconds / n:.1f} ms a step")]

    def twin(self, config: ModelConfig):
        import transformers

        transformers.utils.logging.set_verbosity_error()
        default = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with self.device:
                theirs = transformers.AutoConfig.for_model(**config.to_dict())
                return transformers.AutoModelForImageTextToText.from_config(theirs)
        finally:
            torch.set_default_dtype(default)

    def episodes(self, config: ModelConfig, questions: int) -> list[Episode]:
        """Scored episodes of random tokens."""
        made, s = [], self.sizes
        for group in range(questions):
            prompt, picture = self.prompt(config, group)
            back, thumbnails = self.result(config, group)
            for sequence in range(s.group):
                said = [self.stretch(config, s.turn, [], 10_000 + 100 * group + 2 * sequence + i)[0] for i in (0, 1)]
                ids = [*prompt, *said[0], *back, *said[1]]
                mask = [0] * s.prompt + [1] * s.turn + [0] * s.result + [1] * s.turn
                images = picture + [(s.prompt + s.turn + at, image) for at, image in thumbnails]
                episode = Episode(
                    Example("", b"", "", ()), group, sequence, ids, mask, [0.0] * len(ids), images, s.prompt
                )
                episode.advantage = float((-1) ** sequence)
                made.append(episode)
        return made

    def train(self, shape: str, recompute: bool, optimizer: bool = True) -> list[Figure]:
        """One update of 4 questions: real (unique) tokens, and their floating-point operations of the peak."""
        questions = min(4, self.sizes.questions)
        micro_tokens = self.micro_tokens(shape, questions, recompute, optimizer)
        policy = self.policy(shape)
        policy.checkpoint_blocks = policy.visual.checkpoint_blocks = recompute
        stepper = self.optimizer(policy) if optimizer else NoOptimizer()
        trainer = Trainer(policy, stepper, self.suppressed(policy.config), micro_tokens=micro_tokens)
        batch = self.episodes(policy.config, questions)
        trainer.step([batch], 0.0)  # makes the optimizer's moments
        tried = 0
        while tried != trainer.micro_tokens:  # until it knows what fits beside them
            tried = trainer.micro_tokens
            update = trainer.step([batch], 0.0)
        seconds = self.median(lambda: trainer.step([batch], 0.0))
        assert update["skipped_updates"] == 0
        share = self.share("matrix", self.operations(policy, batch, update["trained"]), seconds)
        remark = f"{seconds:.2f} s an update, micro-batches of {trainer.micro_tokens:,} tokens at most"
        if self.cuda:
            remark += f", {torch.cuda.max_memory_allocated() / GIB:.0f} GiB at most"
        return [Figure(update["trained"] / seconds, "tok/s", share=share, remark=remark)]

    def optimizer(self, policy: VLModel) -> MasterWeights:
        return MasterWeights(policy, weight_decay=0.0)

    def operations(self, policy: VLModel, batch: list[Episode], tokens: int) -> float:
        """Forward and backward, without what is computed again; the tower's attention is left out."""
        decoder = self.decoder_operations(policy, batch, tokens)
        if not lora.trains_tower(policy):  # nor does it run: features are those of the rollouts
            return decoder
        images = {image.key: image for e in batch for _, image in e.images}.values()
        patches = sum(image.grid[0] * image.grid[1] for image in images)
        return decoder + patches * products(policy.visual.blocks.parameters())

    def decoder_operations(self, policy: VLModel, batch: list[Episode], tokens: int) -> float:
        """Those of decoder and head."""
        config, s = policy.config, self.sizes
        suffix = 2 * s.turn + s.result
        pairs = len(batch) * suffix * (s.prompt + suffix / 2) + len(batch) / s.group * s.prompt**2 / 2
        attended = 6 * 2 * pairs * config.num_hidden_layers * config.num_attention_heads * config.head_dim
        head = len(batch) * 2 * s.turn * products([policy.head_weight])
        return products(policy.model.layers.parameters()) * tokens + attended + head

    def their_training(self, shape: str) -> list[Figure]:
        """transformers' model on padded text of the same lengths, a group at a time, with gradient checkpointing."""
        config, s = self.shapes[shape], self.sizes
        questions, twin = min(4, s.questions), self.twin(config)
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
        unique = questions * (s.prompt + s.group * (length - s.prompt))
        remark = "unique tokens; padded, recompute, no pictures, no optimizer"
        return [Figure(unique / self.median(update), "tok/s", remark=remark)]

    def memory(self, shape: str) -> list[Figure]:
        """What weight and optimizer hold for each parameter, after a step."""
        item, n = self.dtype.itemsize, plan.sizes(self.shapes[shape]).count()
        self.check((10 if item == 2 else 16) * n, "an optimizer's first step")
        policy = self.policy(shape)
        before = torch.cuda.memory_allocated() if self.cuda else 0
        optimizer = self.optimizer(policy)
        optimizer.make_state()
        tensors = sum(t.nbytes for t in optimizer.tensors().values())
        held = torch.cuda.memory_allocated() - before if self.cuda else tensors
        remark = f"without gradient; that takes {item}, or 4 with several micro-batches"
        return [Figure(item + held / n, "B", predicted=8.0 if item == 2 else 12.0, remark=remark)]

    # ---- both

    def step(self, shape: str, rank: int = 0) -> list[Figure]:
        """A whole step: rollout with one search an episode, then one update. Its memory beside that of the plan."""
        s, cuda = self.sizes, self.cuda
        tokens = self.micro_tokens(shape, s.questions, True, rank=rank)
        planned = self.memory_plan(shape, s.questions, tokens, True, rank).moments
        policy = self.policy(shape, rank)
        policy.checkpoint_blocks = policy.visual.checkpoint_blocks = True
        trainer = self.trainer(policy, tokens)
        self.roll(trainer, min(2, s.questions))  # loads kernels
        held = []

        def peak() -> None:
            held.append(torch.cuda.max_memory_allocated() / GIB if cuda else None)
            if cuda:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()

        peak()
        self.graphs.clear()
        rollout, (episodes, steps) = common.timed(lambda: self.roll(trainer, s.questions), self.device)
        peak()
        update, metrics = common.timed(lambda: trainer.step([episodes], 0.0), self.device)
        peak()
        halved = f"; out of memory: micro-batches now {trainer.micro_tokens}" if trainer.micro_tokens < tokens else ""
        remark = f"{s.questions} × {s.group}: rollout {rollout:.1f} s, update {update:.1f} s{halved}"
        gap = f"largest {metrics['logp_gap_max']:.1e}"
        return [
            Figure(rollout + update, "s", remark=remark),
            Figure(held[1], "GiB", "memory of the rollout", predicted=planned[0] / GIB, remark="predicted: mmsr.plan"),
            Figure(
                held[2], "GiB", "memory of the update", predicted=max(planned[1:]) / GIB, remark="predicted: mmsr.plan"
            ),
            Figure(self.graphs["captured"], "graphs", "captured", remark=f"of {self.graphs['begun']} tried"),
            Figure(100 * self.graphs["replayed"] / max(steps, 1), "%", "decode steps replayed", remark=f"of {steps}"),
            Figure(metrics["logp_gap"], "nats", "gap between sampler and trainer", remark=gap),
        ]

    def trainer(self, policy: VLModel, tokens: int) -> Trainer:
        """Of a run; with adapters its reference is the policy without them, and features are those of the rollouts."""
        optimizer = self.optimizer(policy)
        optimizer.make_state()
        more: dict[str, Any] = {}
        if lora.adapted(policy):
            more = dict(reference=policy, kl=KL, features={})
        return Trainer(policy, optimizer, self.suppressed(policy.config), micro_tokens=tokens, **more)

    def roll(self, trainer: Trainer, questions: int) -> tuple[list[Episode], int]:
        """Rollouts of a turn, a search and a turn, scored by the dice; and the number of decode steps."""
        s, config = self.sizes, trainer.model.config
        groups = self.groups(config, questions, s.group)
        results = {id(group): self.result(config, number) for number, group in enumerate(groups)}
        if trainer.features is not None:
            trainer.features.clear()
        sampler = self.sampler(trainer.model)
        engine = self.engine(sampler, questions * s.group, s.turn, s.most, features=trainer.features)
        engine.submit(groups)
        while engine.busy:
            for sequence in engine.step():
                if 0 in sequence.loss_mask:
                    engine.finish(sequence)
                else:
                    engine.extend(sequence, *results[id(sequence.group)])
        made = []
        for number, group in enumerate(groups):
            for sample, sequence in enumerate(group.sequences):
                made.append(self.finished(group, number, sequence, sample))
        return made, engine.counts["decode_steps"]

    def finished(self, group: SequenceGroup, number: int, sequence: GeneratedSequence, sample: int) -> Episode:
        n = len(group.ids)
        lists = (group.ids + sequence.ids, [0] * n + sequence.loss_mask, [0.0] * n + sequence.logps)
        images = group.images + [(n + at, image) for at, image in sequence.images]
        episode = Episode(Example("", b"", "", ()), number, sample, *lists, images, n)
        episode.advantage = float((-1) ** sample)
        return episode

    def gap(self, shape: str, rank: int = 0) -> list[Figure]:
        """|log p while sampling − log p in training| of the tokens of one group."""
        s, policy = self.sizes, self.policy(shape, rank)
        engine = self.engine(self.sampler(policy), s.group, s.turn, s.most)
        (group,) = groups = self.groups(policy.config, 1, s.group)
        engine.submit(groups)
        while engine.busy:
            for sequence in engine.step():
                engine.finish(sequence)
        episodes = [self.finished(group, 0, sequence, i) for i, sequence in enumerate(group.sequences)]
        trainer = Trainer(policy, None, self.suppressed(policy.config))
        batch = pack(episodes, split_into_micro_batches(episodes, 10**6)[0], self.device)
        with torch.no_grad():
            logps, _ = trainer.log_probs(policy, batch, ImageFeatures(policy, batch.images, False))
        gap = (logps - batch.sampled_logps).abs()
        remark = f"largest {gap.max():.1e}; {attention.backend(policy.head_weight)} kernels"
        return [Figure(float(gap.mean()), "nats", remark=remark)]


def products(weights: Iterable[Tensor]) -> int:
    """Operations for each row that is multiplied with these weights, forward and backward.

    Two for a number of a weight in the forward pass, two for the gradient of the row, two for that of the weight.
    """
    return sum((6 if weight.requires_grad else 4) * weight.numel() for weight in weights)


class NoOptimizer:
    """Leaves the weights alone, in no memory: for a card that holds a model with its gradients and no more."""

    def expect(self, passes: int) -> None:
        pass

    def step(self, lr: float) -> None:
        pass


def tiny_shapes() -> dict[str, ModelConfig]:
    tower = dict(depth=2, hidden_size=32, num_heads=2, intermediate_size=44, out_hidden_size=64)
    small = dict(vocab_size=400, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    ids = dict(bos_token_id=390, eos_token_id=391, image_token_id=392, video_token_id=393)
    ids |= dict(vision_start_token_id=394, vision_end_token_id=395)
    more = dict(
        num_key_value_heads=2, mrope_section=(2, 3, 3), vision=VisionConfig(**tower, fullatt_block_indexes=(1,))
    )
    vision = Qwen3VisionConfig(**tower, num_position_embeddings=64, deepstack_visual_indexes=(0,))
    more3 = dict(num_key_value_heads=2, mrope_section=(4, 2, 2), vision=vision, head_dim=16)
    made = {}
    for name, config in SHAPES.items():
        of_family = more3 if isinstance(config, Qwen3VLConfig) else more
        made[name] = replace(config, **small, **of_family, **ids)
    return made


def main() -> None:
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing but answers may reach the parent, whatever a library prints
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    sizes, shapes = (Sizes.tiny(), tiny_shapes()) if options.tiny else (Sizes(), SHAPES)
    with distributed(options.device) as ranks:
        bench = Bench(ranks.device, sizes, torch.bfloat16, shapes)
        print(json.dumps({"ready": common.machine(ranks.device)}), file=channel, flush=True)
        for line in sys.stdin:
            print(json.dumps(bench.answer(json.loads(line))), file=channel, flush=True)


if __name__ == "__main__":
    main()
