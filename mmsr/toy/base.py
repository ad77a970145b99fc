"""The toy world's base model: a tokenizer, a tiny Qwen2.5-VL or Qwen3-VL, and its warm start.

The warm start stands in for pre-training and instruction tuning: it trains on supervised traces, with the same trainer
that GRPO uses later. A trace that does not search first recalls what a search would find. So recall and "let me look it
up" compete in one softmax, and recall of the town and "look it up" in another. How sharp the recall is becomes the
knowledge boundary that reinforcement learning finds. With an opaque reason ("I recognise it") every run drifts to
searching always.

A warm start that is too short does the same, even where its greedy answers are perfect. So the result must pass a gate,
a test at T = 1.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from mmsr import model as modeling
from mmsr.chat import PROMPTS, Chat, Piece
from mmsr.engine import Engine
from mmsr.episode import ANSWERED, Episode, Example, Observation
from mmsr.pretrained.save import save
from mmsr.qwen3_vl import Qwen3VisionConfig, Qwen3VLConfig
from mmsr.rollout import Limits, Rollout, Script
from mmsr.system.determinism import deterministic
from mmsr.system.errors import UserError
from mmsr.system.files import cache_folder, code_digest
from mmsr.system.progress import progress, say
from mmsr.tools import IMAGE_SEARCH, TEXT_SEARCH, Tool, Toolbox, search_tools
from mmsr.toy import world as toy
from mmsr.toy.world import MAX_PIXELS, MIN_PIXELS, NAME, QUESTIONS, TOWN, Category, Concept, World
from mmsr.update import MasterWeights, Trainer
from mmsr.vision import QWEN2_5_VL, Processor, VisionConfig, load_image, prepare

# ---- tokenizer and model --------------------------------------------------------------------------------------------

# The control tokens of Qwen2.5-VL and Qwen3-VL, in their order. They follow the vocabulary.
SPECIAL = """
    <|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|>
    <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>
""".split()


def build_tokenizer() -> Tokenizer:
    """Byte-level BPE, so that any text has ids, trained so that a syllable or a word of the traces is one token."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(r" ?[^\s]+|\s"), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    corpus = []
    for syllable in toy.SYLLABLES:
        corpus += [syllable, f" {syllable}"] * 2000
    for word in _words():
        corpus += [word, f" {word}"] * 200
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=4096, min_frequency=100, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    return tokenizer


def _words() -> list[str]:
    """The words of the prompts and the traces, each once, without the placeholders."""
    texts = [path.read_text() for path in sorted((PROMPTS / "toy").glob("*.txt"))]
    texts += [*QUESTIONS, *toy.PAGES, *toy.TITLES, toy.LOOK_IT_UP, toy.look_up(""), copied(""), "user assistant system"]
    words = dict.fromkeys(" ".join(texts).split())  # a set that keeps the order
    return [word for word in words if "{" not in word]


def model_config(tokenizer: Tokenizer, family: str = "qwen2_5") -> modeling.ModelConfig:
    """About a million parameters in the architecture of Qwen2.5-VL, or that of Qwen3-VL: `family` "qwen3"."""
    decoder = dict(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.token_to_id("<|endoftext|>"),
        eos_token_id=tokenizer.token_to_id("<|im_end|>"),
        image_token_id=tokenizer.token_to_id("<|image_pad|>"),
        video_token_id=tokenizer.token_to_id("<|video_pad|>"),
        vision_start_token_id=tokenizer.token_to_id("<|vision_start|>"),
        vision_end_token_id=tokenizer.token_to_id("<|vision_end|>"),
    )
    vocabulary = tokenizer.get_vocab_size()
    tower = dict(depth=2, hidden_size=96, num_heads=4, intermediate_size=192, out_hidden_size=128)
    if family == "qwen2_5":
        vision = VisionConfig(**tower, fullatt_block_indexes=(1,))
        return modeling.ModelConfig(vocabulary, mrope_section=(4, 6, 6), vision=vision, **decoder)
    vision = Qwen3VisionConfig(**tower, num_position_embeddings=8 * 8, deepstack_visual_indexes=(0,))
    return Qwen3VLConfig(vocabulary, head_dim=32, mrope_section=(6, 5, 5), vision=vision, **decoder)


# ---- traces ---------------------------------------------------------------------------------------------------------

DIRECT = 0.125  # share of the traces that are asked with direct.txt, and so answer at once
SEARCH = 0.5  # chance, in the others, of each search that could be made


def recalled(concept: Concept, question: int) -> str:
    """The model turn that answers from memory."""
    facts = concept.name if question == NAME else f"{concept.name} , {concept.town}"
    return f"<reason> {facts} . </reason> <answer> {concept.answer(question)} </answer>"


def copied(answer: str) -> str:
    """The model turn that answers from the results of a search."""
    return f"<reason> results say so . </reason> <answer> {answer} </answer>"


class Traces:
    """Supervised episodes: half about the taught pools, half about emblems that are seen once, with random facts.

    What the model is not meant to know about a concept is made up for each trace, as the model will make it up.
    """

    def __init__(self, world: World, chat: Chat, seed: int, processor: Processor = QWEN2_5_VL):
        """`processor`: of the model's pictures."""
        self.world = world
        self.chat = chat
        self.processor = processor
        self.rng = np.random.default_rng([seed, 4])
        self.made = 0
        pools = [pool for pool in world.settings.pools if pool.facts]
        self.taught = world.of(*[pool.name for pool in pools])
        exposure = {pool.name: pool.exposure for pool in pools}
        exposures = np.array([exposure[concept.pool] for concept in self.taught])  # (taught,)
        self.chances = exposures / exposures.sum()  # (taught,)

    def batch(self, n: int) -> list[Episode]:
        emblems = toy.draw_emblems(self.rng, n // 2, unlike=self.world.taught)  # (N / 2, 8)
        novel = [Concept(emblem, toy.made_up(self.rng, 1, 3)[0], town="", pool="novel") for emblem in emblems]
        drawn = self.rng.choice(len(self.taught), n - len(novel), p=self.chances)  # (N / 2,)
        concepts = [self.taught[i] for i in drawn] + novel
        pictures = toy.render(np.stack([concept.emblem for concept in concepts]), self.rng)  # (N, SIZE, SIZE, 3)
        return [self._episode(concepts[i], pictures[i], i) for i in range(n)]

    def _episode(self, concept: Concept, picture: np.ndarray, group_id: int) -> Episode:
        question = int(self.rng.integers(len(QUESTIONS)))
        self.made += 1
        image = prepare(PIL.Image.fromarray(picture), f"trace {self.made}", MIN_PIXELS, MAX_PIXELS, self.processor)
        direct = self.rng.random() < DIRECT
        prompt = self.chat.prompt(QUESTIONS[question], image, direct)
        example = Example(id="", image=b"", question=QUESTIONS[question], answers=(), category=concept.pool)
        episode = Episode(example, group_id, 0)
        episode.prompt_length = len(prompt.ids)
        episode.advantage = 1.0
        self._append(episode, prompt, 0)
        self._converse(episode, self._as_known(concept), question, direct)
        return episode

    def _converse(self, episode: Episode, concept: Concept, question: int, direct: bool) -> None:
        """Add the model's turns and the searches to a prompt."""
        two_hops = self.world.settings.two_hops
        by_image, by_text = self.rng.random(2) < SEARCH
        if by_image and not direct:
            self._say(episode, toy.LOOK_IT_UP)
            concept = self._read(episode, IMAGE_SEARCH, concept)
            if question == NAME or not two_hops:
                self._say(episode, copied(concept.answer(question)))
                return
            concept = self._as_known(concept)
        if by_text and not direct and question == TOWN and two_hops:
            self._say(episode, toy.look_up(concept.name))
            concept = self._read(episode, TEXT_SEARCH, concept)
            self._say(episode, copied(concept.town))
            return
        self._say(episode, recalled(concept, question))

    def _as_known(self, concept: Concept) -> Concept:
        """The concept, with a made-up town if the model is not meant to know the town."""
        if self.world.settings.facts(concept.pool) > TOWN:
            return concept
        return replace(concept, town=toy.made_up(self.rng, 1, 2)[0])

    def _read(self, episode: Episode, tool: str, concept: Concept) -> Concept:
        """Show the results of a search for a concept. Returns the concept of the result that the trace believes."""
        about = self.world.web.about(concept, self.rng)
        hits = self.world.web.hits(tool, about, self.rng)
        limits = (MIN_PIXELS, MAX_PIXELS)
        thumbnails = [load_image(hit.image, *limits, processor=self.processor) if hit.image else None for hit in hits]
        results = self.chat.observation(tool, Observation(hits), thumbnails, episode.example.question)
        self._append(episode, results, 0)
        believed = self.rng.choice(len(about), p=self.world.settings.reader)
        return about[believed]

    def _say(self, episode: Episode, text: str) -> None:
        self._append(episode, Piece(self.chat.assistant(text)), 1)

    def _append(self, episode: Episode, piece: Piece, trained: int) -> None:
        for place, image in piece.images:
            episode.images.append((len(episode.input_ids) + place, image))
        episode.input_ids += piece.ids
        episode.loss_mask += [trained] * len(piece.ids)
        episode.logps += [0.0] * len(piece.ids)


# ---- warm start -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WarmStart:
    """The proven recipe. After `steps`, training continues for `extra` steps at a time until the gate is passed."""

    steps: int = 0  # 0: as many as the pools' exposures need
    batch: int = 64
    lr: float = 1.5e-3
    warmup: int = 50
    decay_from: float = 0.6
    extra: int = 150
    stretches: int = 6  # how often, at most, it continues
    copying: float = 0.95  # gate: accuracy on unknown concepts when all searches are forced, T = 1
    names: float = 0.85  # gate: accuracy on taught names when asked to answer directly, T = 1
    towns: float = 0.85  # gate: the same for towns

    def rate(self, step: int) -> float:
        """The learning rate: a linear warm-up, a constant, and a linear decay to 5 % from `decay_from` of the steps."""
        rising = (step + 1) / self.warmup
        falling = (self.steps - step) / (self.steps * (1 - self.decay_from))
        return self.lr * min(1.0, rising, max(falling, 0.05))


# A change of the code of these modules makes a new base model; a change of comments and docstrings does not.
MADE_BY = """
    toy/world toy/base vision attention model system/chunked_log_probs grammar chat grpo pack update system/optimizer
""".split()
BY_FAMILY = {"qwen2_5": [], "qwen3": ["qwen3_vl"]}  # modules that make the model of one family


def base_model(world: World, recipe: WarmStart = WarmStart(), family: str = "qwen2_5") -> Path:
    """Folder of the warm-started model for `world`, a Hugging Face checkpoint; made once, then found by its hash.

    `family`: as --toy-model has it. Raises UserError when the gate is not passed after the last of `recipe.stretches`.
    """
    # The base model cannot know how well the web retrieves, nor what is asked later. Such worlds share a base model.
    world = World(world.seed, replace(world.settings, wrong=0.0, categories=()))
    if not recipe.steps:
        shown = sum(pool.size * pool.exposure for pool in world.settings.pools if pool.facts)
        recipe = replace(recipe, steps=round(shown / (recipe.batch / 2)))
    cache = cache_folder()
    folder = cache / f"toy-base-{_digest(world, recipe, family)}"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            _warm_start(world, recipe, Path(scratch) / "model", family)
            try:
                (Path(scratch) / "model").rename(folder)
            except OSError:  # another process was first
                if not folder.is_dir():
                    raise
    return folder


def _digest(world: World, recipe: WarmStart, family: str) -> str:
    """Identifies the base model by everything that it is made from."""
    package = Path(__file__).parents[1]
    made_by = [code_digest(package / f"{name}.py") for name in [*MADE_BY, *BY_FAMILY[family]]]
    prompts = [file.read_text(encoding="utf-8") for file in sorted((PROMPTS / "toy").glob("*.txt"))]
    made_of = repr((made_by, prompts, world.seed, world.settings, recipe, family))
    return hashlib.sha256(made_of.encode()).hexdigest()[:16]


def _tools(world: World) -> list[Tool]:
    return search_tools(world.web, 1, int(world.settings.two_hops))


def _warm_start(world: World, recipe: WarmStart, folder: Path, family: str) -> None:
    """Train a model until it passes the gate, and save it. Raises UserError when it does not pass."""
    folder.mkdir()
    deterministic(True)
    tokenizer = _save_tokenizer(folder)
    chat = Chat(folder, PROMPTS / "toy", _tools(world))
    model = modeling.random_model(model_config(tokenizer, family), seed=world.seed)
    suppressed = chat.suppressed_tokens(model.config.vocab_size)
    optimizer = MasterWeights(model, betas=(0.9, 0.98))
    trainer = Trainer(model, optimizer, suppressed, loss_norm="token", sft=True)
    traces = Traces(world, chat, world.seed, model.config.vision.processor)
    say("Warm start, a stand-in for pre-training: made once per world, then kept.")
    bar = progress("warm start", recipe.steps, "step")
    last = recipe.steps + recipe.stretches * recipe.extra
    for step in range(last + 1):
        if step >= recipe.steps and (step - recipe.steps) % recipe.extra == 0:
            passed, message = _gate_passed(_gate(model, chat, world, suppressed), recipe)
            say(f"warm start, step {step}: {message}")
            if passed:
                break
            if step == last:
                raise UserError(
                    f"the toy warm start is not good enough after {step} steps: {message}; take another --seed"
                )
            bar.total = step + recipe.extra
        metrics = trainer.step([traces.batch(recipe.batch)], recipe.rate(step))
        bar.update()
        bar.set_postfix(loss=f"{metrics['loss']:.3f}")
    bar.close()
    save(model, folder)


def _save_tokenizer(folder: Path) -> Tokenizer:
    """Make the tokenizer, and the files that transformers needs to open it."""
    tokenizer = build_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    end_token = "<|im_end|>"
    pad_token = "<|endoftext|>"
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "eos_token": end_token,
        "pad_token": pad_token,
    }
    generation_config = {
        "eos_token_id": tokenizer.token_to_id(end_token),
        "pad_token_id": tokenizer.token_to_id(pad_token),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(generation_config, indent=2) + "\n")
    return tokenizer


def _gate(model, chat: Chat, world: World, suppressed: torch.Tensor) -> dict[str, float]:
    """Accuracy at T = 1: on unknown concepts with all searches forced, on taught names and towns answered directly.

    Names and towns are left out where no pool was shown them `toy.ENOUGH` times.
    """
    unknown = tuple(pool.name for pool in world.settings.pools if pool.facts == 0)
    taught = [pool for pool in world.settings.pools if pool.exposure >= toy.ENOUGH]
    with_name = tuple(pool.name for pool in taught if pool.facts > NAME)
    with_town = tuple(pool.name for pool in taught if pool.facts > TOWN)

    def accuracy(asked: Category, direct: bool) -> float:
        engine = Engine(model, chat.stop_id, suppressed, slots=256, max_tokens=256, turn_tokens=32)
        limits = Limits(3, MIN_PIXELS, MAX_PIXELS, processor=model.config.vision.processor)
        rollout = Rollout(engine, chat, Toolbox(_tools(world), inline=True), limits, direct=direct)
        scripts = None if direct else lambda example, sample: Script(world.always_search(example))
        episodes = rollout(world.questions(asked, 200, "gate"), 1, ("gate", world.seed), scripts)
        right = sum(e.status == ANSWERED and e.answer == e.example.answers[0] for e in episodes)
        return right / len(episodes)

    reached = {"copying": accuracy(Category("copying", unknown), direct=False)}
    if with_name:
        reached["names"] = accuracy(Category("names", with_name, (NAME,)), direct=True)
    if with_town:
        reached["towns"] = accuracy(Category("towns", with_town, (TOWN,)), direct=True)
    return reached


def _gate_passed(reached: dict[str, float], recipe: WarmStart) -> tuple[bool, str]:
    """Whether every accuracy is as high as `recipe` needs, and a message that says so."""
    needed = {"copying": recipe.copying, "names": recipe.names, "towns": recipe.towns}
    passed = all(reached[name] >= needed[name] for name in reached)
    message = ", ".join(f"{name} {reached[name]:.3f} (needs {needed[name]})" for name in reached)
    return passed, message
