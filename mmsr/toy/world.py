"""The toy world: a synthetic FactualVQA and its web, for training on any machine in minutes.

A *concept* is an emblem of eight attributes with a made-up name and a made-up town. Concepts come in *pools*, by how
much the base model was taught about them (`base.py`): nothing, the name, or name and town. The toy web knows all of
them. So the best policy is to answer what the model knows and to search for what it does not know — and to tell the two
apart, on emblems that were never trained on. Questions come in *categories*, by their pools and by what they ask for.

There are two settings. In BASIC the titles that an image search finds also tell the town: the right episode is `answer`
or `image → answer`. In FULL they tell only the name, and a text search for that name finds the town:

| category (what is asked for)                    | the model knows | the right episode     |
|-------------------------------------------------|-----------------|-----------------------|
| familiar (a name), familiar_fact (a town)       | name; and town  | answer                |
| known_new_fact (a town)                         | name            | text → answer         |
| unfamiliar, held_out (a name)                   | nothing         | image → answer        |
| unfamiliar_fact, unknown_two_hop (a town)       | nothing         | image → text → answer |

held_out and unknown_two_hop ask about concepts that no training question is about.

Shapes: N emblems or pictures, S = SIZE pixels.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Sequence

import numpy as np
import PIL.Image

from mmsr.episode import Example, Hit, Observation
from mmsr.tools import IMAGE_SEARCH, TEXT_SEARCH

QUESTIONS = ("what is this ?", "which town does it belong to ?")
NAME = 0  # index in QUESTIONS
TOWN = 1  # index in QUESTIONS; of a concept with n known facts the first n questions can be answered
PAGES = ("{name} of {town}", "{name} in {town}", "{name} from {town}")
TITLES = ("{name} crest", "{name} wiki", "{name} emblem")  # of an image search that does not tell the town
ENOUGH = 450  # exposures in the warm start; with fewer a concept is known, but not as surely as training needs
RESULTS = 3  # results of a search
DISTRACTION = 0.3  # chance that a result below the first is about something else
LOOK_IT_UP = "<reason> let me look it up . </reason> <search><img></search>"
SIZE = 56  # picture side in pixels
# What a model's pictures are resized to at least and at most. So one of SIZE has 4 × 4 patches, 4 image tokens, for
# Qwen2.5-VL, and for Qwen3-VL, whose patches are larger and which sees it at 64 × 64 pixels.
MIN_PIXELS = 56 * 56
MAX_PIXELS = 64 * 64


def look_up(name: str) -> str:
    """The model turn that searches for a name's town."""
    return f"<reason> {name} , look it up . </reason> <text_search> {name} town </text_search>"


# ---- settings -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pool:
    """Concepts about which the base model knows equally much."""

    name: str
    size: int
    facts: int = 0  # known about each: 0 nothing, 1 its name, 2 its name and town
    exposure: int = 0  # how often the warm start shows each


@dataclass(frozen=True)
class Category:
    """Questions that are evaluated together, and how many of them there are in training."""

    name: str
    pools: tuple[str, ...]
    questions: tuple[int, ...] = (NAME, TOWN)  # asked in turn
    train: int = 0
    weight: float = 0.0  # in means over all categories


@dataclass(frozen=True)
class Settings:
    """The kind of world. A variation is a `dataclasses.replace` of BASIC or FULL."""

    pools: tuple[Pool, ...]
    categories: tuple[Category, ...]
    two_hops: bool = False  # an image search tells only the name, and a text search for that name the town
    wrong: float = 0.0  # share of searches whose first result is about something else
    thumbnails: bool = False  # image search shows a picture beside each title
    reader: tuple[float, ...] = (1.0, 0.0, 0.0)  # chance that the warm start copies from the first result, the second …

    @property
    def mix(self) -> dict[str, float]:
        return {category.name: category.weight for category in self.categories}

    def facts(self, pool: str) -> int:
        """How many facts the base model knows about each concept of a pool; 0 for a pool that this world lacks."""
        facts = {pool.name: pool.facts for pool in self.pools}
        return facts.get(pool, 0)


BASIC = Settings(
    pools=(Pool("familiar", 40, facts=2, exposure=720), Pool("unfamiliar", 300), Pool("held_out", 300)),
    categories=(
        Category("familiar", ("familiar",), train=240, weight=0.5),
        Category("unfamiliar", ("unfamiliar",), train=240, weight=0.25),
        Category("held_out", ("held_out",), weight=0.25),
    ),
)

FULL = Settings(
    pools=(
        Pool("known", 24, facts=2, exposure=700),  # its towns are recalled in only a quarter of the traces
        Pool("named", 24, facts=1, exposure=500),
        Pool("unfamiliar", 300),
        Pool("held_out", 300),
    ),
    # A third of the training questions is about each pool but held_out. Known and unknown have equal weight.
    categories=(
        Category("familiar", ("known", "named"), (NAME,), train=160, weight=4 / 12),
        Category("familiar_fact", ("known",), (TOWN,), train=80, weight=2 / 12),
        Category("known_new_fact", ("named",), (TOWN,), train=80, weight=2 / 12),
        Category("unfamiliar", ("unfamiliar",), (NAME,), train=80, weight=1 / 12),
        Category("unfamiliar_fact", ("unfamiliar",), (TOWN,), train=80, weight=1 / 12),
        Category("held_out", ("held_out",), (NAME,), weight=1 / 12),
        Category("unknown_two_hop", ("held_out",), (TOWN,), weight=1 / 12),
    ),
    two_hops=True,
    wrong=0.07,  # at best .93 of the answers are right where one search is needed, and .86 where two are
)

SETTINGS = {"basic": BASIC, "full": FULL}


def graded(settings: Settings, exposures: Sequence[int]) -> Settings:
    """`settings` with a pool of 18 concepts for each of `exposures`: how often the warm start shows them.

    The base model knows only their names, and no training question is about them. For each pool there is a category of
    name questions, `exposure_0` and so on, which has no weight in means.
    """
    pools = tuple(Pool(f"exposure_{n}", 18, facts=1 if n > 0 else 0, exposure=n) for n in exposures)
    categories = tuple(Category(pool.name, (pool.name,), (NAME,)) for pool in pools)
    return replace(settings, pools=settings.pools + pools, categories=settings.categories + categories)


# ---- concepts and their pictures ------------------------------------------------------------------------------------

RGB = [
    (220, 40, 40),
    (40, 170, 60),
    (50, 80, 220),
    (240, 210, 40),
    (200, 60, 200),
    (40, 200, 210),
    (245, 245, 245),
    (40, 40, 40),
]
COLOURS = np.array(RGB) / 255.0  # (8, 3)
# The attributes of an emblem, and how many values each has.
BACKGROUND, MAIN, MAIN_COLOUR, INNER, INNER_COLOUR, BADGE, BADGE_COLOUR, CORNER = range(8)
RANGES = np.array([8, 6, 8, 4, 8, 3, 8, 4])
CORNERS = np.array([[-0.68, -0.68], [0.68, -0.68], [-0.68, 0.68], [0.68, 0.68]])  # where the badge is: x, y


def draw_emblems(rng: np.random.Generator, n: int, unlike: np.ndarray | None = None) -> np.ndarray:
    """`n` distinct random emblems (N, 8) with different adjacent colours, ≥ 3 attributes away from each of `unlike`."""
    found = np.empty((0, 8), dtype=int)
    while len(found) < n:
        new = rng.integers(0, RANGES, (2 * n, 8))  # (2N, 8)
        clash = new[:, BACKGROUND] == new[:, MAIN_COLOUR]  # (2N,)
        clash |= new[:, MAIN_COLOUR] == new[:, INNER_COLOUR]
        clash |= new[:, BADGE_COLOUR] == new[:, BACKGROUND]
        new = new[~clash]
        if unlike is not None:
            differences = (new[:, None] != unlike[None]).sum(-1)  # (number of new ones, number of unlike)
            new = new[(differences >= 3).all(1)]
        both = np.concatenate([found, new])
        _, first_places = np.unique(both, axis=0, return_index=True)
        found = both[np.sort(first_places)]
    return found[:n]


# The distance of a point from the centre of a unit shape: below 1 inside, above 1 outside.
SHAPES = (
    lambda x, y: np.hypot(x, y),  # circle
    lambda x, y: np.maximum(abs(x), abs(y)) * 1.15,  # square
    lambda x, y: np.maximum(y * 1.4, abs(x) * 1.1 - y * 0.7) * 1.1,  # triangle
    lambda x, y: (abs(x) + abs(y)) * 0.85,  # diamond
    lambda x, y: np.maximum(np.maximum(abs(x), abs(y)), np.minimum(abs(x), abs(y)) * 2.8),  # cross
    lambda x, y: 0.6 + abs(np.hypot(x, y) - 0.75) * 1.6,  # ring
)


def _masks(shapes: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Soft masks (N, S, S) of unit shapes, whose indices in SHAPES are `shapes` (N,); x, y (N, S, S)."""
    distance = np.empty_like(x)  # (N, S, S)
    for index in np.unique(shapes):
        chosen = shapes == index  # (N,)
        distance[chosen] = SHAPES[index](x[chosen], y[chosen])
    return np.clip((1 - distance) * 8 + 0.5, 0, 1)


def render(emblems: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Pictures (N, S, S, 3) uint8 of emblems (N, 8), each shifted, scaled, turned, recoloured and noisy."""
    n = len(emblems)
    shift = rng.uniform(-0.12, 0.12, (2, n, 1, 1))
    scale = rng.uniform(0.88, 1.12, (n, 1, 1))
    turn = rng.uniform(-0.2, 0.2, (n, 1, 1))
    axis = np.linspace(-1, 1, SIZE)
    shifted_x = axis[None, None, :] - shift[0]  # (N, 1, S)
    shifted_y = axis[None, :, None] - shift[1]  # (N, S, 1)
    x = (shifted_x * np.cos(turn) + shifted_y * np.sin(turn)) / scale  # (N, S, S)
    y = (shifted_y * np.cos(turn) - shifted_x * np.sin(turn)) / scale  # (N, S, S)
    badge_x, badge_y = CORNERS[emblems[:, CORNER]].T[:, :, None, None]  # (N, 1, 1) each

    def colour(attribute: int) -> np.ndarray:
        """A slightly changed colour for each picture, (N, 1, 1, 3)."""
        return (COLOURS[emblems[:, attribute]] + rng.uniform(-0.07, 0.07, (n, 3)))[:, None, None]

    def paint(picture: np.ndarray, shape: int, shape_colour: int, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        mask = _masks(emblems[:, shape], x, y)[..., None]  # (N, S, S, 1)
        return picture * (1 - mask) + colour(shape_colour) * mask

    picture = np.broadcast_to(colour(BACKGROUND), (n, SIZE, SIZE, 3))
    picture = paint(picture, MAIN, MAIN_COLOUR, x / 0.72, y / 0.72)
    picture = paint(picture, INNER, INNER_COLOUR, x / 0.36, y / 0.36)
    picture = paint(picture, BADGE, BADGE_COLOUR, (x - badge_x) / 0.24, (y - badge_y) / 0.24)
    picture = picture * rng.uniform(0.9, 1.1, (n, 1, 1, 1)) + rng.normal(0, 0.04, picture.shape)
    return (np.clip(picture, 0, 1) * 255).astype(np.uint8)


def png(picture: np.ndarray) -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(picture).save(file, "PNG", compress_level=1)
    return file.getvalue()


# ---- the world ------------------------------------------------------------------------------------------------------

SYLLABLES = [consonant + vowel for consonant in "bdfgjkmnpvz" for vowel in "aeiou"]


def made_up(rng: np.random.Generator, n: int, syllables: int) -> list[str]:
    """`n` distinct made-up words."""
    words: dict[str, None] = {}  # a set that keeps the order
    while len(words) < n:
        word = "".join(rng.choice(SYLLABLES, syllables))
        words[word] = None
    return list(words)


@dataclass(frozen=True)
class Concept:
    emblem: np.ndarray  # (8,)
    name: str
    town: str
    pool: str

    def answer(self, question: int) -> str:
        return self.name if question == NAME else self.town


class World:
    """Concepts, questions about fresh pictures of them, and a web that knows those pictures.

    A function of `seed` and `settings`.
    """

    def __init__(self, seed: int, settings: Settings = BASIC):
        self.seed = seed
        self.settings = settings
        rng = np.random.default_rng([seed, 1])
        pools = []  # of each concept
        for pool in settings.pools:
            pools += [pool] * pool.size
        n = len(pools)
        is_taught = np.array([pool.facts > 0 for pool in pools])  # (N,)
        emblems = np.empty((n, len(RANGES)), dtype=int)  # (N, 8)
        emblems[is_taught] = draw_emblems(rng, is_taught.sum())
        emblems[~is_taught] = draw_emblems(rng, (~is_taught).sum(), unlike=emblems[is_taught])
        names = made_up(rng, n, 3)
        towns = made_up(rng, n, 2)
        self.concepts = [Concept(emblems[i], names[i], towns[i], pools[i].name) for i in range(n)]
        self.taught = emblems[is_taught]  # the emblems about which the base model knows something
        self.web = Web(self.concepts, settings, seed)

    def of(self, *pools: str) -> list[Concept]:
        return [concept for concept in self.concepts if concept.pool in pools]

    def questions(self, category: str | Category, n: int, tag: str) -> list[Example]:
        """`n` questions about fresh pictures of a category. The web then knows them. Equal tags, equal questions."""
        if isinstance(category, str):
            category = {known.name: known for known in self.settings.categories}[category]
        digest = hashlib.sha256(f"{category.name}/{tag}".encode()).digest()
        rng = np.random.default_rng([self.seed, 2, int.from_bytes(digest[:4], "little")])
        pool = self.of(*category.pools)
        chosen = [pool[i] for i in rng.integers(0, len(pool), n)]
        pictures = render(np.stack([concept.emblem for concept in chosen]), rng)  # (N, S, S, 3)
        examples = []
        for i, concept in enumerate(chosen):
            image = png(pictures[i])
            self.web.add(image, concept)
            question = category.questions[i % len(category.questions)]
            example_id = f"{category.name}-{tag}-{i}"
            answers = (concept.answer(question),)
            examples.append(Example(example_id, image, QUESTIONS[question], answers, category.name))
        return examples

    @cached_property
    def train(self) -> list[Example]:
        """The questions of reinforcement learning."""
        examples = []
        for category in self.settings.categories:
            if category.train:
                examples += self.questions(category, category.train, "train")
        return examples

    def always_search(self, example: Example, texts: bool = True) -> list[str]:
        """Model turns that search for everything, known or not, and believe the first title."""
        turns = [LOOK_IT_UP]
        if self.settings.two_hops and texts and example.question == QUESTIONS[TOWN]:
            for hit in self.web.image_search(example.image).hits[:1]:
                name = hit.title.split()[0]
                turns.append(look_up(name))
        return turns


class Web:
    """The toy world's web, a search back-end.

    It sees only picture bytes or words. It finds the pictures that were added to it, and the towns of known names.
    Equal searches give equal results. Where retrieval is imperfect, a share `wrong` of the pictures leads to something
    else first, and so do the names of the same share of each pool's concepts.
    """

    def __init__(self, concepts: list[Concept], settings: Settings, seed: int):
        self.concepts = concepts
        self.settings = settings
        self.seed = seed
        self.names = {concept.name: concept for concept in concepts}
        self.pictures: dict[bytes, Concept] = {}
        self._seen: dict[bytes, Observation] = {}  # results of image searches, by the picture's digest
        self.misleading: set[str] = set()  # names whose text search finds something else first
        rng = np.random.default_rng([seed, 5])
        for pool in settings.pools:
            names = [concept.name for concept in concepts if concept.pool == pool.name]
            wrong = rng.choice(names, round(settings.wrong * len(names)), replace=False)
            self.misleading.update(wrong)

    def add(self, image: bytes, concept: Concept) -> None:
        self.pictures[hashlib.sha256(image).digest()] = concept

    def image_search(self, image: bytes, question: str = "", image_url: str = "") -> Observation:
        digest = hashlib.sha256(image).digest()
        concept = self.pictures.get(digest)
        if concept is None:
            return Observation(source="toy")
        if digest not in self._seen:
            rng = self._rng(3, digest)
            misleading = rng.random() < self.settings.wrong
            about = self.about(concept, rng, misleading)
            self._seen[digest] = Observation(self.hits(IMAGE_SEARCH, about, rng), source="toy")
        return self._seen[digest]

    def text_search(self, query: str) -> Observation:
        for word in query.split():
            if word in self.names:
                rng = self._rng(6, hashlib.sha256(word.encode()).digest())
                about = self.about(self.names[word], rng, word in self.misleading)
                return Observation(self.hits(TEXT_SEARCH, about, rng), source="toy")
        return Observation(source="toy")

    def _rng(self, purpose: int, digest: bytes) -> np.random.Generator:
        words = np.frombuffer(digest[:16], dtype=np.uint32)  # (4,)
        return np.random.default_rng([self.seed, purpose, *words])

    def about(self, concept: Concept, rng: np.random.Generator, misleading: bool = False) -> list[Concept]:
        """The concepts that the results of a search are about, the first result first."""
        distracted = rng.random(RESULTS - 1) < DISTRACTION  # (RESULTS - 1,)
        return [self._another(concept, rng) if other else concept for other in [misleading, *distracted]]

    def _another(self, concept: Concept, rng: np.random.Generator) -> Concept:
        other = concept
        while other.name == concept.name:
            other = self.concepts[rng.integers(len(self.concepts))]
        return other

    def hits(self, tool: str, about: Sequence[Concept], rng: np.random.Generator) -> tuple[Hit, ...]:
        """The results that a search shows for these concepts."""
        is_image_search = tool == IMAGE_SEARCH
        forms = TITLES if is_image_search and self.settings.two_hops else PAGES
        titles = []
        for concept in about:
            form = forms[rng.integers(len(forms))]
            titles.append(form.format(name=concept.name, town=concept.town))
        if not (is_image_search and self.settings.thumbnails):
            return tuple(Hit(title=title) for title in titles)
        pictures = render(np.stack([concept.emblem for concept in about]), rng)  # (results, S, S, 3)
        return tuple(Hit(title=title, image=png(picture)) for title, picture in zip(titles, pictures))
