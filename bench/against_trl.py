"""A GRPO step against TRL's GRPOTrainer: the numbers agree, and both are timed.

    pip install -r requirements-bench.txt
    python bench/against_trl.py --check     # TRL's loss and gradients against ours, on the same frozen episodes
    python bench/against_trl.py --runs 3    # seconds a step, and tokens computed, of both; about 10 minutes

Both sides get one tiny Qwen2.5-VL with the same random weights, one thread, fp32, AdamW, the same questions with a
picture each, the same tool with the same thumbnails, and token for token the same prompts and tool results, which TRL
makes with its qwen3_vl template. A search is forced in turn 1, an answer in turn 2, and stop ids are suppressed, so
both sample the same number of tokens. Both use one micro-batch per question and one update. TRL has its defaults and
its default sampler, but no gradient checkpointing, which is on by default and would slow it down: `--checkpointing`
leaves it on. In `--check` TRL's KL term is the plain k3 of the paper; by default TRL 1.16 weights it by the policy's
ratio. Ours has bounds that TRL lacks (`grpo.MOST_GAP`, `grpo.MOST_K3`). The check does not reach them: its largest gap
between the two models' log-probabilities is 1.8, and the first bound is 2.6.
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Sequence

import common
import PIL.Image
import torch
from torch import Tensor

from mmsr import grpo, model
from mmsr.chat import PROMPTS, Chat, Piece
from mmsr.engine import Engine
from mmsr.episode import Episode, Example, Hit, Observation
from mmsr.pretrained.load import load
from mmsr.pretrained.save import save
from mmsr.pretrained.weights import our_name
from mmsr.rollout import Limits
from mmsr.system.parallel import SINGLE
from mmsr.tools import Toolbox, search_tools
from mmsr.toy.base import build_tokenizer
from mmsr.update import LocalBatch, MasterWeights, Stats, Trainer
from mmsr.vision import load_image

# PyPI's torchvision is built for CUDA; beside a CPU torch its operators do not load, and its import fails for want of
# these two. Nothing here runs them.
if not torch.version.cuda:
    torchvision_operators = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        torchvision_operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

try:
    import transformers
    import trl.trainer.grpo_trainer as trl_module
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
    from trl.chat_template_utils import qwen3_vl_chat_template
except ImportError as error:
    sys.exit(f"against_trl.py: {error}: pip install -r requirements-bench.txt")

FILLER = " results"  # one token of the toy tokenizer
LR = 1e-6
MOST_PIXELS = 2**24


@dataclass(frozen=True)
class Sizes:
    """Of one step. The defaults make prompts of 1,112 tokens and tool results of 239."""

    prompts: int = 4
    group: int = 8
    turn: int = 64
    prompt: int = 1112
    result: int = 239
    side: int = 448
    thumbnails: int = 5
    thumbnail_side: int = 112

    @classmethod
    def small(cls) -> Sizes:
        return cls(prompts=3, group=4, turn=8, prompt=0, result=0, side=112, thumbnails=2, thumbnail_side=56)


def image_search(number: int) -> list:
    """Look the picture up on the web.

    Args:
        number: The number of the picture.

    Returns:
        Titles and thumbnails of the pages that show it.
    """
    return ANSWERS[number]


@dataclass
class World:
    """Questions and what a search brings back, in the form of each side, and a folder with the tiny model."""

    sizes: Sizes
    folder: Path
    disturbed: float = 0.0  # added noise that makes a random model's attention and logits less flat
    numbers: dict[str, int] = field(default_factory=dict)  # by question

    def __post_init__(self):
        tokenizer = build_tokenizer()
        self.config = common.tiny_config(tokenizer)
        policy = model.random_model(self.config, seed=0)
        disturb(policy, self.disturbed, seed=1)
        tokenizer.save(str(self.folder / "tokenizer.json"))
        save(policy, self.folder)
        self.parameters = sum(p.numel() for p in policy.parameters())
        fast = transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(self.folder / "tokenizer.json"), eos_token="<|im_end|>", pad_token="<|endoftext|>"
        )
        self.processor = transformers.Qwen2_5_VLProcessor(
            transformers.Qwen2VLImageProcessor(), fast, transformers.Qwen2VLVideoProcessor()
        )
        self.processor.chat_template = fast.chat_template = qwen3_vl_chat_template
        self.special = [i for i, t in fast.added_tokens_decoder.items() if t.special]
        chat = Chat(self.folder, PROMPTS / "toy", [])
        self.suppressed = chat.suppressed_tokens(self.config.vocab_size)
        self.suppressed[chat.stop_id] = True
        self.prompt_padding = self.result_padding = 0
        self.prompt_padding = max(0, self.sizes.prompt - len(self.prompt_ids(0)))
        self.result_padding = max(0, self.sizes.result - len(self.result_ids(0)))
        self.numbers = {self.question(i): i for i in range(self.sizes.prompts)}

    def question(self, number: int) -> str:
        return f"who made {number} ?" + FILLER * self.prompt_padding

    def image(self, number: int) -> bytes:
        return common.picture(self.sizes.side, number)

    def thumbnails(self, number: int) -> list[bytes]:
        n = self.sizes.thumbnails
        return [common.picture(self.sizes.thumbnail_side, 1000 + number * n + i) for i in range(n)]

    def content(self, number: int) -> list[dict]:
        """A tool's answer as TRL wants it."""
        blocks = [{"type": "image", "image": opened(data)} for data in self.thumbnails(number)]
        return [*blocks, {"type": "text", "text": "titles" + FILLER * self.result_padding}]

    def prompt_ids(self, number: int) -> list[int]:
        picture = {"type": "image", "image": opened(self.image(number))}
        messages = [{"role": "user", "content": [picture, {"type": "text", "text": self.question(number)}]}]
        done = self.processor.apply_chat_template(
            [messages], tools=[image_search], add_generation_prompt=True, tokenize=True, return_dict=True
        )
        return list(done["input_ids"][0])

    def result_ids(self, number: int) -> list[int]:
        """A tool's answer behind a turn without a stop id, by TRL's own means."""
        holder = argparse.Namespace(
            processing_class=self.processor, _tokenizer=self.processor.tokenizer, _is_vlm=True, chat_template=None,
            chat_template_kwargs={},
        )  # fmt: skip
        message = {"role": "tool", "name": "image_search", "content": self.content(number)}
        return list(GRPOTrainer._get_tool_suffix_ids(holder, [message]))

    def piece(self, ids: list[int], pictures: Sequence) -> Piece:
        """With each picture's offset, read off its placeholders."""
        pad = self.config.image_token_id
        starts = [i for i, token in enumerate(ids) if token == pad and ids[i - 1] != pad]
        assert len(starts) == len(pictures)
        return Piece(list(ids), list(zip(starts, pictures)))


def opened(data: bytes) -> PIL.Image.Image:
    return PIL.Image.open(io.BytesIO(data)).convert("RGB")


def disturb(policy: torch.nn.Module, by: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=by)


# ---- TRL's side


class Counted(GRPOTrainer):
    """TRL's trainer, with counters and a clock around it."""

    def _generate_single_turn(self, prompt_ids, *args, **options):
        self.counts["prefilled"] += sum(map(len, prompt_ids))
        return super()._generate_single_turn(prompt_ids, *args, **options)

    def _compute_loss(self, policy, inputs):
        self.counts["trained"] += int(inputs["prompt_mask"].sum() + inputs["completion_mask"].sum())
        return super()._compute_loss(policy, inputs)


class Clock(transformers.TrainerCallback):
    """Seconds on the wall, and of the processor's time, which other programs on the machine disturb less."""

    def __init__(self):
        self.seconds: list[float] = []
        self.busy: list[float] = []

    def on_step_begin(self, *_, **__):
        self.start = time.perf_counter(), time.process_time()

    def on_step_end(self, *_, **__):
        self.seconds.append(time.perf_counter() - self.start[0])
        self.busy.append(time.process_time() - self.start[1])


class Theirs:
    """`run` takes some steps of TRL and leaves their seconds in `clock`, what they computed in `counts`."""

    def __init__(self, world: World, steps: int, **options):
        sizes = world.sizes
        self.counts: Counter = Counter()
        self.clock = Clock()
        self.policy = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(world.folder, dtype=torch.float32)
        self.policy.model.visual.register_forward_pre_hook(self._count_images, with_kwargs=True)
        given = dict(
            output_dir=str(world.folder / "trl"), max_steps=steps, per_device_train_batch_size=sizes.group,
            gradient_accumulation_steps=sizes.prompts, num_generations=sizes.group,
            max_completion_length=2 * sizes.turn + len(world.result_ids(0)), learning_rate=LR, beta=0.0,
            loss_type="grpo", lr_scheduler_type="constant", bf16=False, use_cpu=True, gradient_checkpointing=False,
            report_to="none", logging_strategy="no", save_strategy="no", disable_tqdm=True, shuffle_dataset=False,
            generation_kwargs={
                "max_new_tokens": sizes.turn, "suppress_tokens": world.suppressed.nonzero()[:, 0].tolist(),
            },
        )  # fmt: skip
        rows = [{"prompt": [{"role": "user", "content": question}]} for question in world.numbers]
        for row, number in zip(rows, world.numbers.values()):
            row["image"] = opened(world.image(number))
        prompts = {tuple(world.prompt_ids(number)): number for number in world.numbers.values()}
        ANSWERS.update({number: world.content(number) for number in world.numbers.values()})
        trl_module.parse_response = lambda tokenizer, ids, prefix=None, tools=None: _turn(prompts.get(tuple(prefix)))
        self.trainer = Counted(
            self.policy, reward_funcs=_reward, args=GRPOConfig(**(given | options)), processing_class=world.processor,
            train_dataset=Dataset.from_list(rows), tools=[image_search], callbacks=[self.clock],
        )  # fmt: skip
        self.trainer.counts = self.counts
        self.trainer.remove_callback(transformers.PrinterCallback)

    def _count_images(self, module, args, options) -> None:
        grid = options["grid_thw"] if "grid_thw" in options else args[1]
        self.counts["encoded"] += len(grid)

    def run(self) -> None:
        self.trainer.train()


ANSWERS: dict[int, list] = {}  # what TRL's tool returns, by question


def _turn(number: int | None) -> dict:
    """A model turn: after a prompt a call of the tool, else an answer."""
    said = {"role": "assistant", "content": [{"type": "text", "text": "so"}]}
    if number is not None:
        call = {"name": "image_search", "arguments": {"number": number}}
        said["tool_calls"] = [{"type": "function", "function": call}]
    return said


def _reward(completions, **_) -> list[float]:
    return [float(i % 3) for i in range(len(completions))]


# ---- our side


class TemplateChat(Chat):
    """Says what TRL's template says."""

    def __init__(self, world: World, tools):
        super().__init__(world.folder, PROMPTS / "toy", tools)
        self.world = world
        self.prompts = {question: world.prompt_ids(number) for question, number in world.numbers.items()}
        self.results = {question: world.result_ids(number) for question, number in world.numbers.items()}

    def prompt(self, question, image, mode="search"):
        return self.world.piece(self.prompts[question], [image])

    def observation(self, tool_name, observation, images, question):
        return self.world.piece(self.results[question], images)


class Ours:
    """`step` takes one step and adds what it computed to `counts`."""

    def __init__(self, world: World):
        self.world = world
        self.counts: Counter = Counter()
        self.clock = Clock()
        self.policy = load(world.folder)
        self.tools = search_tools(self, max_images=1, max_texts=0)
        self.chat = TemplateChat(world, self.tools)
        self.hits = []
        for number in world.numbers.values():
            self.hits.append(tuple(Hit("title", image=data) for data in world.thumbnails(number)))
        self.examples = [Example(str(i), world.image(i), question, ("",)) for question, i in world.numbers.items()]
        optimizer = MasterWeights(self.policy, weight_decay=0.0)
        said = 2 * world.sizes.turn + len(world.result_ids(0))
        question = len(world.prompt_ids(0)) + world.sizes.group * said
        self.trainer = Trainer(self.policy, optimizer, world.suppressed, micro_tokens=question)

    def image_search(self, image: bytes, question: str, image_url: str = "") -> Observation:
        return Observation(self.hits[self.world.numbers[question]])

    def step(self, number: int) -> None:
        self.clock.on_step_begin()
        sizes = self.world.sizes
        most = len(self.chat.prompts[self.examples[0].question]) + 2 * sizes.turn + 1000
        engine = Engine(
            self.policy, self.chat.stop_id, self.world.suppressed, slots=sizes.prompts * sizes.group, max_tokens=most,
            turn_tokens=sizes.turn,
        )  # fmt: skip
        rollout = common.ForcedSearch(
            engine, self.chat, Toolbox(self.tools, inline=True), Limits(2, 56 * 56, MOST_PIXELS)
        )
        episodes = rollout(self.examples, sizes.group, (number,))
        rewards = torch.tensor(_reward(episodes))
        groups = torch.tensor([episode.group_id for episode in episodes])
        advantages, _ = grpo.group_advantages(rewards, groups, 1e-4)
        for episode, advantage in zip(episodes, advantages.tolist()):
            episode.advantage = advantage
        update = self.trainer.step([episodes], LR)
        self.clock.on_step_end()
        assert {sum(e.loss_mask) for e in episodes} == {2 * sizes.turn} and update["grad_norm"] > 0
        seen = rollout.counts
        self.counts += Counter({key: seen[key] for key in ("prefilled", "prefilled_unique")})
        self.counts += Counter({key: update[key] for key in ("trained", "trained_unique")})
        self.counts["encoded"] += seen["images_encoded"] + update["encoded"]
        self.counts["distinct"] += seen["images_distinct"]


# ---- timing


def compare(sizes: Sizes, runs: int, only: str, checkpointing: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        world = World(sizes, Path(folder))
        ours, theirs = Ours(world), Theirs(world, steps=runs, gradient_checkpointing=checkpointing)
        if only != "trl":
            for number in range(runs):
                ours.step(number)
        if only != "ours":
            theirs.run()
        prompt, result = len(world.prompt_ids(0)), len(world.result_ids(0))
    print(common.machine(packages=("trl",)))
    print(
        f"{world.parameters / 1e6:.1f} M parameters, fp32, no KL; {sizes.prompts} prompts of {prompt} tokens × "
        f"{sizes.group}, 2 turns of {sizes.turn} tokens, results of {result} tokens with {sizes.thumbnails} "
        f"thumbnails, 1 update, TRL with{'' if checkpointing else 'out'} gradient checkpointing; "
        f"medians of {runs} steps\n"
    )
    print(common.table(["per step", "TRL", "mmsr", "ratio"], _rows(ours, theirs, runs)))


def _rows(ours: Ours, theirs: Theirs, runs: int) -> list[list[str]]:
    rows = []
    for name, measured in (("seconds", "seconds"), ("processor seconds", "busy")):
        t, o = getattr(theirs.clock, measured), getattr(ours.clock, measured)
        if t and o:
            rows.append(
                [name, common.spread(t), common.spread(o), f"{statistics.median(t) / statistics.median(o):.1f}"]
            )
    for name, unique in (("prefilled", "prefilled_unique"), ("trained", "trained_unique"), ("encoded", "distinct")):
        theirs_n, ours_n, least = (c // runs for c in (theirs.counts[name], ours.counts[name], ours.counts[unique]))
        what = "images encoded" if name == "encoded" else f"tokens {name}"
        cells = [f"{n:,} ({n / max(least, 1):.2f} × unique)" for n in (theirs_n, ours_n)]
        rows.append([what, *cells, f"{theirs_n / max(ours_n, 1):.1f}"])
    return rows


# ---- the same numbers


def check() -> bool:
    """Print how far TRL and we are apart on frozen episodes. Returns whether that is rounding."""
    with tempfile.TemporaryDirectory() as folder:
        world = World(Sizes.small(), Path(folder), disturbed=0.05)
        episodes = frozen(world)
        theirs = Theirs(world, steps=1, beta=0.1, use_bias_correction_kl=False)
        policy, reference = load(world.folder), load(world.folder)
        disturb(reference, 0.01, seed=2)
        theirs.trainer.ref_model.load_state_dict(_their_names(reference), strict=False)
        rows, agree = [], True
        for loss in LOSSES:
            for kl in (0.0, 0.1):
                for clipped in (False, True):
                    pair = Pair(episodes, policy, reference, theirs, loss, kl, clipped)
                    apart = pair.differences()
                    agree = agree and apart[0] <= MOST_LOSS and max(apart[1:]) <= MOST_GRADIENT
                    clip = f"{pair.clip_fraction:.2f} of the tokens" if clipped else "ratio 1"
                    rows.append([loss.trl_name, loss.our_name, kl, clip, *(f"{x:.1e}" for x in apart)])
    print(common.machine(packages=("trl",)))
    masked = sum(len(e.loss_mask) - e.prompt_length - sum(e.loss_mask) for e in episodes)
    print(f"{len(episodes)} episodes, {masked} tokens of tool results masked, fp32; largest relative differences\n")
    print(
        common.table(
            ["TRL", "mmsr", "KL", "clipped", "loss", "gradient, largest element", "worst parameter"],
            rows,
        )
    )
    print(f"\nlosses within {MOST_LOSS}, gradients within {MOST_GRADIENT}: {'yes' if agree else 'NO'}")
    return agree


@dataclass(frozen=True)
class Loss:
    """One loss by both names. The bounds of the clip make it active on some tokens and not on others."""

    trl_type: str
    norm: str  # --loss-norm
    loss: str = "grpo"  # --loss
    level: str = "token"  # of TRL's importance ratio
    clip_low: float = 0.2
    clip_high: float = 0.2

    @property
    def trl_name(self) -> str:
        return self.trl_type + (", sequence ratio" if self.level == "sequence" else "")

    @property
    def our_name(self) -> str:
        return f"{self.loss}, {self.norm}"

    @property
    def trl_epsilon_high(self) -> float:
        """TRL's bound of CISPO's weight is ε_high itself, not 1 + ε_high."""
        return self.clip_high + (self.loss == "cispo")


LOSSES = (
    Loss("grpo", "sequence"),
    Loss("bnpo", "token"),
    Loss("dapo", "token", clip_high=0.28),
    Loss("dr_grpo", "constant", "dr_grpo"),
    Loss("grpo", "sequence", "gspo", "sequence", clip_low=0.05, clip_high=0.06),
    Loss("cispo", "token", "cispo", clip_low=1.0),
)
MOST_LOSS, MOST_GRADIENT = 1e-6, 1e-5  # relative


def frozen(world: World) -> list[Episode]:
    """Episodes of unequal length: random turns, half of them with a search in between."""
    generator = torch.Generator().manual_seed(3)
    allowed = (~world.suppressed).nonzero()[:, 0]
    episodes = []
    for question, number in world.numbers.items():
        prompt = world.piece(world.prompt_ids(number), [load_image(world.image(number), 56 * 56, MOST_PIXELS)])
        result = world.piece(world.result_ids(number), [load_image(d, 56 * 56) for d in world.thumbnails(number)])
        for sample in range(world.sizes.group):
            example = Example(str(number), b"", question, ())
            episode = Episode(example, number, sample, list(prompt.ids), prompt_length=len(prompt.ids))
            episode.images, episode.loss_mask = list(prompt.images), [0] * len(prompt.ids)
            for turn in range(1 + sample % 2):
                if turn:
                    episode.images += [(len(episode.input_ids) + at, image) for at, image in result.images]
                    episode.input_ids += result.ids
                    episode.loss_mask += [0] * len(result.ids)
                length = int(torch.randint(3, 12, (), generator=generator))
                drawn = allowed[torch.randint(0, len(allowed), (length,), generator=generator)]
                episode.input_ids += drawn.tolist()
                episode.loss_mask += [1] * length
            episode.logps = [0.0] * len(episode.input_ids)
            episode.advantage = float(torch.randn((), generator=generator)) + 0.5
            episodes.append(episode)
    return episodes


def _their_names(policy: model.Qwen2_5_VL) -> dict[str, Tensor]:
    named = policy.state_dict().items()
    return {
        f"model.{n}" if n.startswith("visual") else n.replace("model.", "model.language_model.", 1): w for n, w in named
    }


@dataclass
class Pair:
    """One way to score `episodes`, by both."""

    episodes: list[Episode]
    policy: model.Qwen2_5_VL
    reference: model.Qwen2_5_VL
    theirs: Theirs
    loss: Loss
    kl: float
    clipped: bool  # frozen π_old away from π, so that the clip is active
    clip_fraction: float = 0.0

    def differences(self) -> tuple[float, float, float]:
        """Relative: of the loss; of the gradient's largest element; of the worst parameter's gradient by its norm."""
        loss, gradient = self._ours()
        their_loss, theirs = self._theirs()
        assert gradient.keys() == theirs.keys()
        largest = max(g.abs().max() for g in theirs.values())
        element = max(((gradient[n] - theirs[n]).abs().max() / largest).item() for n in theirs)
        # Key biases have no gradient but rounding: softmax does not see them (rotated ones do, hardly).
        norm = max(
            float((gradient[n] - theirs[n]).norm() / g.norm().clamp(min=largest * 1e-4)) for n, g in theirs.items()
        )
        return abs(loss - their_loss) / abs(their_loss), element, norm

    @cached_property
    def old(self) -> list[Tensor] | None:
        """log π_old of every episode's trained tokens."""
        if not self.clipped:
            return None
        trainer = Trainer(self.policy, None, torch.zeros(self.policy.config.vocab_size, dtype=torch.bool))
        present = trainer.old_logps(LocalBatch.of(self.episodes, SINGLE), Stats())
        generator = torch.Generator().manual_seed(5)
        return [logps + 0.4 * torch.randn(logps.shape, generator=generator) for logps in present]

    def _ours(self) -> tuple[float, dict[str, Tensor]]:
        self.policy.zero_grad()
        nothing = torch.zeros(self.policy.config.vocab_size, dtype=torch.bool)  # TRL bans in sampling, not in training
        reference = self.reference if self.kl else None
        optimizer = MasterWeights(self.policy)
        trainer = Trainer(
            self.policy,
            optimizer,
            nothing,
            reference=reference,
            loss=self.loss.loss,
            kl=self.kl,
            clip_low=self.loss.clip_low,
            clip_high=self.loss.clip_high,
            loss_norm=self.loss.norm,
            token_limit=self.theirs.trainer.max_completion_length,
        )
        stats = trainer.accumulate_gradient(LocalBatch.of(self.episodes, SINGLE), self.old)
        self.clip_fraction = stats.sums["clip_fraction"] / stats.sums["tokens"]
        assert not self.clipped or 0.1 < self.clip_fraction < 0.9
        return stats.sums["loss"], {name: p.grad.clone() for name, p in self.policy.named_parameters()}

    def _theirs(self) -> tuple[float, dict[str, Tensor]]:
        trainer, theirs = self.theirs.trainer, self.theirs.policy
        trainer.loss_type, trainer.importance_sampling_level = self.loss.trl_type, self.loss.level
        trainer.epsilon_low, trainer.epsilon_high = self.loss.clip_low, self.loss.trl_epsilon_high
        trainer.beta, trainer.current_gradient_accumulation_steps = self.kl, 1
        trainer.args.steps_per_generation = 1
        theirs.train()
        theirs.zero_grad()
        inputs = self._inputs()
        if self.kl:
            wanted = ("pixel_values", "image_grid_thw", "num_images", "mm_token_type_ids")
            with torch.no_grad():
                inputs["ref_per_token_logps"], _, _ = trainer._get_per_token_logps_and_entropies(
                    trainer.ref_model,
                    torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1),
                    torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1),
                    inputs["completion_ids"].shape[1],
                    **{name: inputs[name] for name in wanted},
                )
        loss = trainer.compute_loss(theirs, inputs)
        loss.backward()
        found = {our_name(name): p.grad for name, p in theirs.named_parameters()}
        return loss.item(), found

    def _inputs(self) -> dict[str, object]:
        """What TRL's `_generate_and_score_completions` would have made of the episodes."""

        def block(part, left: bool) -> Tensor:
            rows = [torch.tensor(part(e)) for e in self.episodes]
            return torch.nn.utils.rnn.pad_sequence(rows, True, 0, "left" if left else "right")

        prompts, tails = (lambda e: slice(0, e.prompt_length)), (lambda e: slice(e.prompt_length, None))
        images = [image for e in self.episodes for _, image in e.images]
        inputs = {
            "prompt_ids": block(lambda e: e.input_ids[prompts(e)], True),
            "prompt_mask": block(lambda e: [1] * e.prompt_length, True),
            "completion_ids": block(lambda e: e.input_ids[tails(e)], False),
            "completion_mask": block(lambda e: [1] * len(e.input_ids[tails(e)]), False),
            "tool_mask": block(lambda e: e.loss_mask[tails(e)], False),
            "advantages": torch.tensor([e.advantage for e in self.episodes]),
            "num_items_in_batch": torch.tensor(float(sum(sum(e.loss_mask) for e in self.episodes))),
            "pixel_values": torch.cat([image.patches for image in images]),
            "image_grid_thw": torch.tensor([(1, *image.grid) for image in images]),
            "num_images": [len(e.images) for e in self.episodes],
        }
        every = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        inputs["mm_token_type_ids"] = (every == self.policy.config.image_token_id).long()
        if self.old is not None:
            old = torch.zeros(inputs["tool_mask"].shape)
            old[inputs["tool_mask"].bool()] = torch.cat(self.old[:-1])
            inputs["old_per_token_logps"] = old
        return inputs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare loss and gradients instead of seconds")
    parser.add_argument("--runs", type=int, default=1, help="steps per side; the table has their medians")
    parser.add_argument("--small", action="store_true", help="sizes that take seconds: does it still work?")
    parser.add_argument("--only", choices=("trl", "ours"), default="", help="time one side, to profile it")
    parser.add_argument("--checkpointing", action="store_true", help="TRL recomputes activations, as it comes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    if options.check:
        sys.exit(0 if check() else 1)
    compare(Sizes.small() if options.small else Sizes(), options.runs, options.only, options.checkpointing)


if __name__ == "__main__":
    main()
