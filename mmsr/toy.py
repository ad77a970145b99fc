"""The toy world: a synthetic FactualVQA, its web, a tokenizer and a tiny model, for training on any machine in minutes.

A *concept* is an emblem of eight attributes with a made-up name and a made-up town. Some concepts are **familiar**:
the base model has met them. The others are **unfamiliar** (met only as questions in training) or **held_out** (only in
evaluation), and nothing but the toy web knows them. So the best policy is to answer what one knows and to search for
what one does not — and to tell which is which, on emblems never trained on.

The warm start stands in for pre-training and instruction tuning: supervised traces through the very trainer that GRPO
uses later. A direct answer recalls the name first: recall and "let me look it up" then compete in one softmax, and how
sharp the recall is becomes the knowledge boundary that reinforcement learning finds.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tempfile
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from . import model as modeling
from .chat import PROMPTS, Chat
from .engine import Engine
from .episode import ANSWERED, Episode, Example, Hit, Observation, UserError
from .rollout import Limits, Rollout
from .tools import Toolbox, search_tools
from .update import MasterWeights, Trainer
from .vision import Image, VisionConfig, patchify

CATEGORIES = {"familiar": 40, "unfamiliar": 300, "held_out": 300}  # concepts in each
MIX = {"familiar": 0.5, "unfamiliar": 0.25, "held_out": 0.25}  # weights of overall means: half known, as in training
QUESTIONS = ("what is this ?", "which town does it belong to ?")  # its name; its town
TITLES = ("{name} of {town}", "{name} in {town}", "{name} from {town}")
RESULTS, DISTRACTION = 3, 0.3  # titles per search; chance that a title below the first is about something else
LOOK_IT_UP = "<reason> let me look it up . </reason> <search><img></search>"
SIZE = 56  # picture side in pixels: 4 × 4 patches, 4 image tokens

# ---- concepts and their pictures ------------------------------------------------------------------------------------

COLOURS = np.array(
    [(220, 40, 40), (40, 170, 60), (50, 80, 220), (240, 210, 40), (200, 60, 200), (40, 200, 210), (245,) * 3, (40,) * 3]
) / 255.0  # fmt: skip
# Attributes: background colour, main shape and colour, inner shape and colour, badge shape, colour and corner.
RANGES = np.array([8, 6, 8, 4, 8, 3, 8, 4])
BACKGROUND, MAIN, MAIN_COLOUR, INNER, INNER_COLOUR, BADGE, BADGE_COLOUR, CORNER = range(8)
CORNERS = np.array([[-0.68, -0.68], [0.68, -0.68], [-0.68, 0.68], [0.68, 0.68]])


def draw_emblems(rng: np.random.Generator, n: int, unlike: np.ndarray | None = None) -> np.ndarray:
    """`n` distinct random emblems (n, 8), adjacent colours different, each ≥ 3 attributes away from all `unlike`."""
    found = np.empty((0, 8), dtype=int)
    while len(found) < n:
        new = rng.integers(0, RANGES, (2 * n, 8))
        clash = (new[:, BACKGROUND] == new[:, MAIN_COLOUR]) | (new[:, MAIN_COLOUR] == new[:, INNER_COLOUR])
        new = new[~clash & (new[:, BADGE_COLOUR] != new[:, BACKGROUND])]
        if unlike is not None:
            new = new[((new[:, None] != unlike[None]).sum(-1) >= 3).all(1)]
        both = np.concatenate([found, new])
        found = both[np.sort(np.unique(both, axis=0, return_index=True)[1])]
    return found[:n]


def _inside(shape: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Soft masks (B, SIZE, SIZE) of unit shapes: circle, square, triangle, diamond, cross, ring."""
    distances = (
        lambda x, y: np.hypot(x, y),
        lambda x, y: np.maximum(abs(x), abs(y)) * 1.15,
        lambda x, y: np.maximum(y * 1.4, abs(x) * 1.1 - y * 0.7) * 1.1,
        lambda x, y: (abs(x) + abs(y)) * 0.85,
        lambda x, y: np.maximum(np.maximum(abs(x), abs(y)), np.minimum(abs(x), abs(y)) * 2.8),
        lambda x, y: 0.6 + abs(np.hypot(x, y) - 0.75) * 1.6,
    )
    out = np.empty_like(x)
    for index in np.unique(shape):
        chosen = shape == index
        out[chosen] = distances[index](x[chosen], y[chosen])
    return np.clip((1 - out) * 8 + 0.5, 0, 1)


def render(emblems: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Pictures (B, SIZE, SIZE, 3) uint8 of emblems (B, 8), each shifted, scaled, turned, recoloured and noisy."""
    n = len(emblems)
    shift, scale = rng.uniform(-0.12, 0.12, (2, n, 1, 1)), rng.uniform(0.88, 1.12, (n, 1, 1))
    turn = rng.uniform(-0.2, 0.2, (n, 1, 1))
    axis = np.linspace(-1, 1, SIZE)
    x0, y0 = axis[None, None, :] - shift[0], axis[None, :, None] - shift[1]
    x = (x0 * np.cos(turn) + y0 * np.sin(turn)) / scale
    y = (y0 * np.cos(turn) - x0 * np.sin(turn)) / scale

    def colour(attribute: int) -> np.ndarray:
        return (COLOURS[emblems[:, attribute]] + rng.uniform(-0.07, 0.07, (n, 3)))[:, None, None]

    badge_x, badge_y = CORNERS[emblems[:, CORNER]].T[:, :, None, None]
    picture = np.broadcast_to(colour(BACKGROUND), (n, SIZE, SIZE, 3))
    for shape, paint, mx, my in (
        (emblems[:, MAIN], MAIN_COLOUR, x / 0.72, y / 0.72),
        (emblems[:, INNER], INNER_COLOUR, x / 0.36, y / 0.36),
        (emblems[:, BADGE], BADGE_COLOUR, (x - badge_x) / 0.24, (y - badge_y) / 0.24),
    ):
        mask = _inside(shape, mx, my)[..., None]
        picture = picture * (1 - mask) + colour(paint) * mask
    picture = picture * rng.uniform(0.9, 1.1, (n, 1, 1, 1)) + rng.normal(0, 0.04, picture.shape)
    return (np.clip(picture, 0, 1) * 255).astype(np.uint8)


def png(picture: np.ndarray) -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(picture).save(file, "PNG", compress_level=1)
    return file.getvalue()


# ---- the world ------------------------------------------------------------------------------------------------------

SYLLABLES = [c + v for c in "bdfgjkmnpvz" for v in "aeiou"]


def _words(rng: np.random.Generator, n: int, syllables: int) -> list[str]:
    """`n` distinct made-up words."""
    words: dict[str, None] = {}
    while len(words) < n:
        words["".join(rng.choice(SYLLABLES, syllables))] = None
    return list(words)


@dataclass(frozen=True)
class Concept:
    emblem: np.ndarray
    name: str
    town: str
    category: str

    def answer(self, question: int) -> str:
        return (self.name, self.town)[question]


class World:
    """Concepts, questions about fresh pictures of them, and a web that knows those pictures. A function of `seed`."""

    def __init__(self, seed: int):
        self.seed = seed
        rng = np.random.default_rng([seed, 1])
        total = sum(CATEGORIES.values())
        familiar = draw_emblems(rng, CATEGORIES["familiar"])
        emblems = np.concatenate([familiar, draw_emblems(rng, total - len(familiar), unlike=familiar)])
        names, towns = _words(rng, total, 3), _words(rng, total, 2)
        kinds = [category for category, n in CATEGORIES.items() for _ in range(n)]
        self.concepts = [Concept(*parts) for parts in zip(emblems, names, towns, kinds)]
        self.familiar = emblems[: len(familiar)]
        self.web = Web(self.concepts, seed)

    def of(self, category: str) -> list[Concept]:
        return [concept for concept in self.concepts if concept.category == category]

    def questions(self, category: str, n: int, tag: str) -> list[Example]:
        """`n` questions about fresh pictures of a category, which the web then knows. Equal tags give equal ones."""
        salt = int.from_bytes(hashlib.sha256(f"{category}/{tag}".encode()).digest()[:4], "little")
        rng = np.random.default_rng([self.seed, 2, salt])
        pool = self.of(category)
        chosen = [pool[i] for i in rng.integers(0, len(pool), n)]
        pictures = render(np.stack([concept.emblem for concept in chosen]), rng)
        examples = []
        for i, (concept, picture) in enumerate(zip(chosen, pictures)):
            image, question = png(picture), i % len(QUESTIONS)
            self.web.add(image, concept)
            answers = (concept.answer(question),)
            examples.append(Example(f"{category}-{tag}-{i}", image, QUESTIONS[question], answers, category))
        return examples

    @cached_property
    def train(self) -> list[Example]:
        """The 480 questions of reinforcement learning, half familiar, half unfamiliar."""
        pairs = zip(self.questions("familiar", 240, "train"), self.questions("unfamiliar", 240, "train"))
        return [example for pair in pairs for example in pair]


class Web:
    """The toy world's web, a search back-end. It sees picture bytes only, and finds the pictures that are on it."""

    def __init__(self, concepts: list[Concept], seed: int):
        self.concepts, self.seed = concepts, seed
        self.pictures: dict[bytes, Concept] = {}

    def add(self, image: bytes, concept: Concept) -> None:
        self.pictures[hashlib.sha256(image).digest()] = concept

    def titles(self, concept: Concept, rng: np.random.Generator) -> list[str]:
        """Page titles about a concept, the best first; those below it may be about another."""
        about = [concept] + [
            self.concepts[rng.integers(len(self.concepts))] if rng.random() < DISTRACTION else concept
            for _ in range(RESULTS - 1)
        ]
        return [TITLES[rng.integers(len(TITLES))].format(name=c.name, town=c.town) for c in about]

    def image_search(self, image: bytes, question: str = "") -> Observation:
        digest = hashlib.sha256(image).digest()
        concept = self.pictures.get(digest)
        if concept is None:
            return Observation(source="toy")
        rng = np.random.default_rng([self.seed, 3, *np.frombuffer(digest[:16], dtype=np.uint32)])
        return Observation(tuple(Hit(title=title) for title in self.titles(concept, rng)), source="toy")

    def text_search(self, query: str) -> Observation:
        words = set(query.split())
        found = [c for c in self.concepts if c.name in words or c.town in words]
        hits = tuple(Hit(title=TITLES[0].format(name=c.name, town=c.town)) for c in found[:RESULTS])
        return Observation(hits, source="toy")


# ---- tokenizer and model --------------------------------------------------------------------------------------------

# The control tokens of Qwen2.5-VL, in its order, behind the vocabulary.
SPECIAL = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>"),
]


def build_tokenizer() -> Tokenizer:
    """Byte-level BPE, so that any text has ids, trained so that a syllable is a token and a word of the traces too."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(r" ?[^\s]+|\s"), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    templates = [path.read_text() for path in sorted((PROMPTS / "toy").glob("*.txt"))]
    said = [*QUESTIONS, *TITLES, LOOK_IT_UP, _direct("", ""), _copied(""), "user assistant system"]
    words = [word for word in dict.fromkeys(" ".join(templates + said).split()) if "{" not in word]
    corpus = [form for s in SYLLABLES for form in [s, f" {s}"] for _ in range(2000)]
    corpus += [form for w in words for form in [w, f" {w}"] for _ in range(200)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=4096, min_frequency=100, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    return tokenizer


def model_config(tokenizer: Tokenizer) -> modeling.ModelConfig:
    """About a million parameters in the architecture of Qwen2.5-VL."""
    return modeling.ModelConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        mrope_section=(4, 6, 6),
        tie_word_embeddings=True,
        bos_token_id=tokenizer.token_to_id("<|endoftext|>"),
        eos_token_id=tokenizer.token_to_id("<|im_end|>"),
        image_token_id=tokenizer.token_to_id("<|image_pad|>"),
        video_token_id=tokenizer.token_to_id("<|video_pad|>"),
        vision_start_token_id=tokenizer.token_to_id("<|vision_start|>"),
        vision_end_token_id=tokenizer.token_to_id("<|vision_end|>"),
        vision=VisionConfig(
            depth=2, hidden_size=96, num_heads=4, intermediate_size=192, out_hidden_size=128, fullatt_block_indexes=(1,)
        ),
    )


# ---- warm start -----------------------------------------------------------------------------------------------------


def _direct(name: str, answer: str) -> str:
    return f"<reason> {name} . </reason> <answer> {answer} </answer>"


def _copied(answer: str) -> str:
    return f"<reason> results say so . </reason> <answer> {answer} </answer>"


class Traces:
    """Supervised episodes: half about familiar emblems, half about one-off emblems with random names; half search."""

    def __init__(self, world: World, chat: Chat, seed: int):
        self.world, self.chat = world, chat
        self.rng = np.random.default_rng([seed, 4])
        self.made = 0

    def batch(self, n: int) -> list[Episode]:
        rng, known = self.rng, self.world.of("familiar")
        emblems = draw_emblems(rng, n // 2, unlike=self.world.familiar)
        novel = [Concept(emblem, *_words(rng, 1, 3), *_words(rng, 1, 2), "novel") for emblem in emblems]
        concepts = [known[i] for i in rng.integers(0, len(known), n - len(novel))] + novel
        pictures = render(np.stack([concept.emblem for concept in concepts]), rng)
        return [self._episode(concept, picture, i) for i, (concept, picture) in enumerate(zip(concepts, pictures))]

    def _episode(self, concept: Concept, picture: np.ndarray, group_id: int) -> Episode:
        rng, question = self.rng, int(self.rng.integers(len(QUESTIONS)))
        self.made += 1
        image = Image(patchify(picture), (SIZE // 14, SIZE // 14), f"trace {self.made}")
        search = rng.random() < 0.5
        mode = "search" if search or rng.random() < 0.75 else "direct"
        prompt = self.chat.prompt(QUESTIONS[question], image, mode)
        episode = Episode(Example("", b"", QUESTIONS[question], (), concept.category), group_id, 0, prompt.ids)
        episode.loss_mask, episode.images = [0] * len(prompt.ids), prompt.images
        episode.prompt_length, episode.advantage = len(prompt.ids), 1.0
        if not search:
            return self._say(episode, _direct(concept.name, concept.answer(question)))
        self._say(episode, LOOK_IT_UP)
        hits = tuple(Hit(title=title) for title in self.world.web.titles(concept, rng))
        back = self.chat.observation("image_search", Observation(hits), [None] * len(hits), QUESTIONS[question])
        episode.input_ids += back.ids
        episode.loss_mask += [0] * len(back.ids)
        return self._say(episode, _copied(concept.answer(question)))

    def _say(self, episode: Episode, text: str) -> Episode:
        ids = self.chat.assistant(text)
        episode.input_ids += ids
        episode.loss_mask += [1] * len(ids)
        episode.logps = [0.0] * len(episode.input_ids)
        return episode


@dataclass(frozen=True)
class WarmStart:
    """The proven recipe. From `steps` on, training goes on in stretches of `extra` until the gate is passed."""

    steps: int = 900
    batch: int = 64
    lr: float = 1.5e-3
    warmup: int = 50
    decay_from: float = 0.6
    extra: int = 150
    most: int = 1800
    copying: float = 0.95  # gate: accuracy on unfamiliar concepts when the search is forced, T = 1
    recall: float = 0.8  # gate: accuracy on familiar concepts when asked to answer directly, T = 1

    def rate(self, step: int) -> float:
        left = (self.steps - step) / (self.steps * (1 - self.decay_from))
        return self.lr * min(1.0, (step + 1) / self.warmup, max(left, 0.05))


# Modules whose change makes it anew.
MADE_BY = ("toy", "vision", "attention", "model", "chat", "grpo", "pack", "optimizer", "update")


def base_model(world: World, recipe: WarmStart = WarmStart()) -> Path:
    """Folder of the warm-started model for `world`, a Hugging Face checkpoint; made once, then found by its hash.

    Raises UserError when the gate is not passed within `recipe.most` steps.
    """
    modules = [Path(__file__).with_name(f"{name}.py") for name in MADE_BY]
    made_of = [file.read_bytes() for file in [*modules, *sorted((PROMPTS / "toy").glob("*.txt"))]]
    digest = hashlib.sha256(b"".join([*made_of, repr((world.seed, recipe)).encode()])).hexdigest()[:16]
    cache = Path(os.environ.get("MMSR_CACHE") or Path.home() / ".cache" / "mmsr")
    folder = cache / f"toy-base-{digest}"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            _warm_start(world, recipe, Path(scratch) / "model")
            try:
                (Path(scratch) / "model").rename(folder)
            except OSError:  # another process was first
                if not folder.is_dir():
                    raise
    return folder


def _warm_start(world: World, recipe: WarmStart, folder: Path) -> None:
    folder.mkdir()
    tokenizer = build_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(kind | names, indent=2) + "\n")
    ends = {name.replace("token", "token_id"): tokenizer.token_to_id(token) for name, token in names.items()}
    (folder / "generation_config.json").write_text(json.dumps(ends, indent=2) + "\n")
    chat = Chat(folder, PROMPTS / "toy", search_tools(world.web, 1, 0))
    model = modeling.random_model(model_config(tokenizer), seed=world.seed)
    banned = chat.banned(model.config.vocab_size)
    optimizer = MasterWeights(model, lambda params: torch.optim.AdamW(params, betas=(0.9, 0.98), fused=True))
    trainer = Trainer(model, optimizer, banned, loss_norm="token", sft=True)
    traces = Traces(world, chat, world.seed)
    print("Warm start, a stand-in for pre-training: made once per world, then kept.")
    bar = tqdm(total=recipe.steps, desc="warm start", unit="step")
    for step in count():
        if step >= recipe.steps and (step - recipe.steps) % recipe.extra == 0:
            copying, recall = _gate(model, chat, world, banned)
            bar.write(f"step {step}: copies from results {copying:.3f}, recalls {recall:.3f}")
            if copying >= recipe.copying and recall >= recipe.recall:
                break
            if step >= recipe.most:
                raise UserError(
                    f"the toy warm start still copies {copying:.3f} (needs {recipe.copying}) and recalls {recall:.3f} "
                    f"(needs {recipe.recall}) after {step} steps; take another --seed"
                )
            bar.total = step + recipe.extra
        metrics = trainer.step([traces.batch(recipe.batch)], recipe.rate(step))
        bar.update(), bar.set_postfix(loss=f"{metrics['loss']:.3f}")
    bar.close()
    modeling.save(model, folder)


def _gate(model, chat: Chat, world: World, banned: torch.Tensor) -> tuple[float, float]:
    """Accuracy at T = 1: on unfamiliar concepts with the search forced, and on familiar ones answered directly."""

    def accuracy(category: str, direct: bool) -> float:
        engine = Engine(model, chat.stop_id, banned, slots=256, max_tokens=128, turn_tokens=32)
        toolbox = Toolbox(search_tools(world.web, 1, 0), inline=True)
        rollout = Rollout(engine, chat, toolbox, Limits(2, SIZE * SIZE, SIZE * SIZE), direct=direct)
        scripts = None if direct else lambda example, sample: [LOOK_IT_UP]
        episodes = rollout(world.questions(category, 200, "gate"), 1, ("gate", world.seed), scripts)
        return sum(e.status == ANSWERED and e.answer == e.example.answers[0] for e in episodes) / len(episodes)

    return accuracy("unfamiliar", False), accuracy("familiar", True)
