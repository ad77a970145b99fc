"""The toy world's base model: a tokenizer, a tiny Qwen2.5-VL and its warm start.

The warm start stands in for pre-training and instruction tuning: supervised traces through the very trainer that GRPO
uses later. A trace that does not search recalls first what a search would find: recall and "let me look it up" then
compete in one softmax, recall of the town and "look it up" in another, and how sharp the recall is becomes the
knowledge boundary that reinforcement learning finds. With an opaque reason ("I recognise it") every run drifts to
searching always.

Too short a warm start does the same, however perfect its greedy answers look: so the result is gated, at T = 1.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Callable

import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from mmsr import model as modeling
from mmsr.chat import PROMPTS, Chat, Piece
from mmsr.engine import Engine
from mmsr.episode import ANSWERED, Episode, Example, Observation
from mmsr.pretrained.save import save
from mmsr.rollout import Limits, Rollout, Script
from mmsr.system.errors import UserError
from mmsr.system.files import cache_folder, code_digest
from mmsr.tools import IMAGE_SEARCH, TEXT_SEARCH, Tool, Toolbox, search_tools
from mmsr.toy import world as toy
from mmsr.toy.world import NAME, QUESTIONS, SIZE, TOWN, Category, Concept, World
from mmsr.update import MasterWeights, Trainer
from mmsr.vision import Image, VisionConfig, load_image, patchify

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
    said = [*QUESTIONS, *toy.PAGES, *toy.TITLES, toy.LOOK_IT_UP, toy.look_up(""), copied(""), "user assistant system"]
    words = [word for word in dict.fromkeys(" ".join(templates + said).split()) if "{" not in word]
    corpus = [form for s in toy.SYLLABLES for form in [s, f" {s}"] for _ in range(2000)]
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


# ---- traces ---------------------------------------------------------------------------------------------------------

DIRECT = 0.125  # share of the traces that are asked with direct.txt, and so answer at once
SEARCH = 0.5  # chance, in the others, of each search that could be made


def recalled(concept: Concept, question: int) -> str:
    facts = " , ".join((concept.name, concept.town)[: question + 1])
    return f"<reason> {facts} . </reason> <answer> {concept.answer(question)} </answer>"


def copied(answer: str) -> str:
    return f"<reason> results say so . </reason> <answer> {answer} </answer>"


class Traces:
    """Supervised episodes: half about the pools that are taught, half about one-off emblems with random facts.

    What is not to be known of a concept is made up afresh each time, as the model will make it up.
    """

    def __init__(self, world: World, chat: Chat, seed: int):
        self.world, self.chat = world, chat
        self.rng = np.random.default_rng([seed, 4])
        self.made = 0
        self.taught = world.of(*(pool.name for pool in world.settings.pools if pool.facts))
        shown = {pool.name: pool.exposure for pool in world.settings.pools}
        exposures = np.array([shown[concept.pool] for concept in self.taught])
        self.chances = exposures / exposures.sum()

    def batch(self, n: int) -> list[Episode]:
        rng = self.rng
        emblems = toy.draw_emblems(rng, n // 2, unlike=self.world.taught)
        novel = [Concept(emblem, *toy.made_up(rng, 1, 3), "", "novel") for emblem in emblems]
        concepts = [self.taught[i] for i in rng.choice(len(self.taught), n - len(novel), p=self.chances)] + novel
        pictures = toy.render(np.stack([concept.emblem for concept in concepts]), rng)
        return [self._episode(concept, picture, i) for i, (concept, picture) in enumerate(zip(concepts, pictures))]

    def _episode(self, concept: Concept, picture: np.ndarray, group_id: int) -> Episode:
        rng, question = self.rng, int(self.rng.integers(len(QUESTIONS)))
        self.made += 1
        image = Image(patchify(picture), (SIZE // 14, SIZE // 14), f"trace {self.made}")
        direct = rng.random() < DIRECT
        prompt = self.chat.prompt(QUESTIONS[question], image, direct)
        episode = Episode(Example("", b"", QUESTIONS[question], (), concept.pool), group_id, 0)
        episode.prompt_length, episode.advantage = len(prompt.ids), 1.0
        self._append(episode, prompt, 0)
        self._converse(episode, self._as_known(concept), question, direct)
        return episode

    def _converse(self, episode: Episode, concept: Concept, question: int, direct: bool) -> None:
        two_hops = self.world.settings.two_hops
        by_image, by_text = (self.rng.random(2) < SEARCH) & (not direct)
        if by_image:
            self._say(episode, toy.LOOK_IT_UP)
            concept = self._read(episode, IMAGE_SEARCH, concept)
            if question == NAME or not two_hops:
                return self._say(episode, copied(concept.answer(question)))
            concept = self._as_known(concept)
        if by_text and question == TOWN and two_hops:
            self._say(episode, toy.look_up(concept.name))
            concept = self._read(episode, TEXT_SEARCH, concept)
            return self._say(episode, copied(concept.town))
        return self._say(episode, recalled(concept, question))

    def _as_known(self, concept: Concept) -> Concept:
        """The concept with a town that is made up, unless that is to be known."""
        if self.world.settings.facts(concept.pool) > TOWN:
            return concept
        return replace(concept, town=toy.made_up(self.rng, 1, 2)[0])

    def _read(self, episode: Episode, tool: str, concept: Concept) -> Concept:
        """Show the results of a search for a concept. Returns what the result that is believed is about."""
        web, reader = self.world.web, self.world.settings.reader
        about = web.about(concept, self.rng)
        hits = web.hits(tool, about, self.rng)
        thumbnails = [load_image(hit.image, SIZE * SIZE, SIZE * SIZE) if hit.image else None for hit in hits]
        back = self.chat.observation(tool, Observation(hits), thumbnails, episode.example.question)
        self._append(episode, back, 0)
        return about[self.rng.choice(len(about), p=reader)]

    def _say(self, episode: Episode, text: str) -> None:
        self._append(episode, Piece(self.chat.assistant(text)), 1)

    def _append(self, episode: Episode, piece: Piece, trained: int) -> None:
        episode.images += [(len(episode.input_ids) + at, image) for at, image in piece.images]
        episode.input_ids += piece.ids
        episode.loss_mask += [trained] * len(piece.ids)
        episode.logps += [0.0] * len(piece.ids)


# ---- warm start -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WarmStart:
    """The proven recipe. After `steps`, training goes on in stretches of `extra` until the gate is passed."""

    steps: int = 0  # 0: as many as the pools' exposures take
    batch: int = 64
    lr: float = 1.5e-3
    warmup: int = 50
    decay_from: float = 0.6
    extra: int = 150
    stretches: int = 6
    copying: float = 0.95  # gate: accuracy on unknown concepts when all searches are forced, T = 1
    names: float = 0.85  # gate: accuracy on names that were taught when asked to answer directly, T = 1
    towns: float = 0.85  # gate: the same on towns

    def rate(self, step: int) -> float:
        left = (self.steps - step) / (self.steps * (1 - self.decay_from))
        return self.lr * min(1.0, (step + 1) / self.warmup, max(left, 0.05))


# Modules of which a change makes the base model anew, unless it is one of words: comments and docstrings.
MADE_BY = (
    "toy/world",
    "toy/base",
    "vision",
    "attention",
    "model",
    "system/chunked_log_probs",
    "chat",
    "grpo",
    "pack",
    "update",
    "system/optimizer",
)


def base_model(world: World, recipe: WarmStart = WarmStart()) -> Path:
    """Folder of the warm-started model for `world`, a Hugging Face checkpoint; made once, then found by its hash.

    Raises UserError when the gate is not passed after the last of `recipe.stretches`.
    """
    # How well the web retrieves and what is asked later is nothing that the base model can know: worlds share it.
    world = World(world.seed, replace(world.settings, wrong=0.0, categories=()))
    if not recipe.steps:
        shown = sum(pool.size * pool.exposure for pool in world.settings.pools if pool.facts)
        recipe = replace(recipe, steps=round(shown / (recipe.batch / 2)))
    made_by = [code_digest(Path(__file__).parents[1] / f"{name}.py") for name in MADE_BY]
    prompts = [file.read_text(encoding="utf-8") for file in sorted((PROMPTS / "toy").glob("*.txt"))]
    made_of = repr((made_by, prompts, world.seed, world.settings, recipe))
    digest = hashlib.sha256(made_of.encode()).hexdigest()[:16]
    cache = cache_folder()
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


def _tools(world: World) -> list[Tool]:
    return search_tools(world.web, 1, int(world.settings.two_hops))


def _warm_start(world: World, recipe: WarmStart, folder: Path) -> None:
    folder.mkdir()
    tokenizer = _save_tokenizer(folder)
    chat = Chat(folder, PROMPTS / "toy", _tools(world))
    model = modeling.random_model(model_config(tokenizer), seed=world.seed)
    suppressed = chat.suppressed_tokens(model.config.vocab_size)
    optimizer = MasterWeights(model, betas=(0.9, 0.98))
    trainer = Trainer(model, optimizer, suppressed, loss_norm="token", sft=True)
    traces = Traces(world, chat, world.seed)
    needed = {"copying": recipe.copying, "names": recipe.names, "towns": recipe.towns}
    print("Warm start, a stand-in for pre-training: made once per world, then kept.")
    bar = tqdm(total=recipe.steps, desc="warm start", unit="step")
    for step in count():
        if step >= recipe.steps and (step - recipe.steps) % recipe.extra == 0:
            reached = _gate(model, chat, world, suppressed)
            told = ", ".join(f"{what} {reached[what]:.3f} (needs {needed[what]})" for what in reached)
            bar.write(f"step {step}: {told}")
            if all(reached[what] >= needed[what] for what in reached):
                break
            if step >= recipe.steps + recipe.stretches * recipe.extra:
                raise UserError(
                    f"the toy warm start is not good enough after {step} steps: {told}; take another --seed"
                )
            bar.total = step + recipe.extra
        metrics = trainer.step([traces.batch(recipe.batch)], recipe.rate(step))
        bar.update(), bar.set_postfix(loss=f"{metrics['loss']:.3f}")
    bar.close()
    save(model, folder)


def _save_tokenizer(folder: Path) -> Tokenizer:
    """Make the tokenizer, and the files by which transformers opens it."""
    tokenizer = build_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(kind | names, indent=2) + "\n")
    ends = {name.replace("token", "token_id"): tokenizer.token_to_id(token) for name, token in names.items()}
    (folder / "generation_config.json").write_text(json.dumps(ends, indent=2) + "\n")
    return tokenizer


def _gate(model, chat: Chat, world: World, suppressed: torch.Tensor) -> dict[str, float]:
    """Accuracy at T = 1: on unknown concepts with all searches forced, on taught names and towns answered directly."""

    def pools(known: Callable[[toy.Pool], bool]) -> tuple[str, ...]:
        return tuple(pool.name for pool in world.settings.pools if known(pool))

    def accuracy(asked: Category, direct: bool) -> float:
        engine = Engine(model, chat.stop_id, suppressed, slots=256, max_tokens=256, turn_tokens=32)
        limits = Limits(3, SIZE * SIZE, SIZE * SIZE)
        rollout = Rollout(engine, chat, Toolbox(_tools(world), inline=True), limits, direct=direct)
        scripts = None if direct else lambda example, sample: Script(world.always_search(example))
        episodes = rollout(world.questions(asked, 200, "gate"), 1, ("gate", world.seed), scripts)
        return sum(e.status == ANSWERED and e.answer == e.example.answers[0] for e in episodes) / len(episodes)

    unknown = pools(lambda pool: not pool.facts)
    named = pools(lambda pool: pool.facts > NAME and pool.exposure >= toy.ENOUGH)
    placed = pools(lambda pool: pool.facts > TOWN and pool.exposure >= toy.ENOUGH)
    return {
        "copying": accuracy(Category("copying", unknown), direct=False),
        "names": accuracy(Category("names", named, (NAME,)), direct=True),
        "towns": accuracy(Category("towns", placed, (TOWN,)), direct=True),
    }
