"""The toy world: a synthetic FactualVQA and its web, for training on any machine in minutes.

A *concept* is an emblem of eight attributes with a made-up name and a made-up town. Concepts come in *pools*, by how
much the base model was taught of them (`base.py`): nothing, the name, or name and town. What it does not know, the
toy web does. So the best policy is to answer what one knows and to search for what one does not — and to tell which is
which, on emblems never trained on. Questions come in *categories*, by their pools and by what they ask for.

One world, two settings. In BASIC the titles that an image search finds tell the town too: the right episode is `answer`
or `image → answer`. In FULL they tell the name alone, and a town is found by a text search for that name:

| category (what is asked of whom)                | the model knows | the right episode     |
|-------------------------------------------------|-----------------|-----------------------|
| familiar (a name), familiar_fact (a town)       | name; and town  | answer                |
| known_new_fact (a town)                         | name            | text → answer         |
| unfamiliar, held_out (a name)                   | nothing         | image → answer        |
| unfamiliar_fact, unknown_two_hop (a town)       | nothing         | image → text → answer |

held_out and unknown_two_hop ask about concepts that no training question is about.
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
NAME, TOWN = 0, 1  # places in QUESTIONS; a concept of which n facts are known is one whose first n answers are
PAGES = ("{name} of {town}", "{name} in {town}", "{name} from {town}")
TITLES = ("{name} crest", "{name} wiki", "{name} emblem")  # of an image search where they do not tell the town
ENOUGH = 450  # exposures in the warm start; with fewer a concept is known, but not as surely as training needs
RESULTS, DISTRACTION = 3, 0.3  # results per search; chance that one below the first is about something else
LOOK_IT_UP = "<reason> let me look it up . </reason> <search><img></search>"
SIZE = 56  # picture side in pixels: 4 × 4 patches, 4 image tokens


def look_up(name: str) -> str:
    """The model turn that searches for a name's town."""
    return f"<reason> {name} , look it up . </reason> <text_search> {name} town </text_search>"


# ---- settings -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pool:
    """Concepts of which the base model knows equally much."""

    name: str
    size: int
    facts: int = 0  # known of each: none, its name, its name and town
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
    """What kind of world. A variation is a `dataclasses.replace` of BASIC or FULL."""

    pools: tuple[Pool, ...]
    categories: tuple[Category, ...]
    two_hops: bool = False  # an image search tells the name alone, and a text search for that the town
    wrong: float = 0.0  # share of searches whose first result is about something else
    thumbnails: bool = False  # image search shows a picture beside each title
    reader: tuple[float, ...] = (1.0, 0.0, 0.0)  # chance that the warm start copies from the first result, the second …

    @property
    def mix(self) -> dict[str, float]:
        return {category.name: category.weight for category in self.categories}

    def facts(self, pool: str) -> int:
        """How many facts the base model knows of the concepts of a pool; none of one that is not the world's."""
        return next((p.facts for p in self.pools if p.name == pool), 0)


BASIC = Settings(
    pools=(
        Pool("familiar", 40, facts=2, exposure=720),
        Pool("unfamiliar", 300),
        Pool("held_out", 300),
    ),
    categories=(
        Category("familiar", ("familiar",), train=240, weight=0.5),
        Category("unfamiliar", ("unfamiliar",), train=240, weight=0.25),
        Category("held_out", ("held_out",), weight=0.25),
    ),
)

FULL = Settings(
    pools=(
        Pool("known", 24, facts=2, exposure=700),  # its towns are recalled in a quarter of the traces only
        Pool("named", 24, facts=1, exposure=500),
        Pool("unfamiliar", 300),
        Pool("held_out", 300),
    ),
    categories=(  # a third of the training questions about each pool but held_out; known and unknown weigh alike
        Category("familiar", ("known", "named"), (NAME,), train=160, weight=4 / 12),
        Category("familiar_fact", ("known",), (TOWN,), train=80, weight=2 / 12),
        Category("known_new_fact", ("named",), (TOWN,), train=80, weight=2 / 12),
        Category("unfamiliar", ("unfamiliar",), (NAME,), train=80, weight=1 / 12),
        Category("unfamiliar_fact", ("unfamiliar",), (TOWN,), train=80, weight=1 / 12),
        Category("held_out", ("held_out",), (NAME,), weight=1 / 12),
        Category("unknown_two_hop", ("held_out",), (TOWN,), weight=1 / 12),
    ),
    two_hops=True,
    wrong=0.07,  # so that .93 can be right at best where one search is needed, and .86 where two are
)

SETTINGS = {"basic": BASIC, "full": FULL}


def graded(settings: Settings, exposures: Sequence[int], size: int = 6) -> Settings:
    """`settings` with more pools, of graded familiarity: the warm start shows the concepts of each as often as said.

    Nothing is known of them but the name, they are in no training question, and for each there is a category of name
    questions, `exposure_0` and so on, which has no weight in means.
    """
    pools = tuple(Pool(f"exposure_{n}", size, facts=int(n > 0), exposure=n) for n in exposures)
    categories = tuple(Category(pool.name, (pool.name,), (NAME,)) for pool in pools)
    return replace(settings, pools=settings.pools + pools, categories=settings.categories + categories)


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


def made_up(rng: np.random.Generator, n: int, syllables: int) -> list[str]:
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
    pool: str

    def answer(self, question: int) -> str:
        return (self.name, self.town)[question]


class World:
    """Concepts, questions about fresh pictures of them, and a web that knows those pictures.

    A function of `seed` and `settings`.
    """

    def __init__(self, seed: int, settings: Settings = BASIC):
        self.seed, self.settings = seed, settings
        rng = np.random.default_rng([seed, 1])
        of_each = [pool for pool in settings.pools for _ in range(pool.size)]
        taught = np.array([pool.facts > 0 for pool in of_each])
        emblems = np.empty((len(of_each), len(RANGES)), dtype=int)
        emblems[taught] = draw_emblems(rng, taught.sum())
        emblems[~taught] = draw_emblems(rng, (~taught).sum(), unlike=emblems[taught])
        names, towns = made_up(rng, len(of_each), 3), made_up(rng, len(of_each), 2)
        self.concepts = [Concept(e, name, town, p.name) for e, name, town, p in zip(emblems, names, towns, of_each)]
        self.taught = emblems[taught]  # of these the base model knows something
        self.web = Web(self.concepts, settings, seed)

    def of(self, *pools: str) -> list[Concept]:
        return [concept for concept in self.concepts if concept.pool in pools]

    def questions(self, category: str | Category, n: int, tag: str) -> list[Example]:
        """`n` questions about fresh pictures of a category, which the web then knows. Equal tags give equal ones."""
        if isinstance(category, str):
            category = next(c for c in self.settings.categories if c.name == category)
        salt = int.from_bytes(hashlib.sha256(f"{category.name}/{tag}".encode()).digest()[:4], "little")
        rng = np.random.default_rng([self.seed, 2, salt])
        pool = self.of(*category.pools)
        chosen = [pool[i] for i in rng.integers(0, len(pool), n)]
        pictures = render(np.stack([concept.emblem for concept in chosen]), rng)
        examples = []
        for i, (concept, picture) in enumerate(zip(chosen, pictures)):
            image, question = png(picture), category.questions[i % len(category.questions)]
            self.web.add(image, concept)
            name, answers = f"{category.name}-{tag}-{i}", (concept.answer(question),)
            examples.append(Example(name, image, QUESTIONS[question], answers, category.name))
        return examples

    @cached_property
    def train(self) -> list[Example]:
        """The questions of reinforcement learning."""
        asked = [category for category in self.settings.categories if category.train]
        return [example for category in asked for example in self.questions(category, category.train, "train")]

    def always_search(self, example: Example, texts: bool = True) -> list[str]:
        """Model turns that search for all that is asked, known or not. They believe the first title."""
        if not (self.settings.two_hops and texts and example.question == QUESTIONS[TOWN]):
            return [LOOK_IT_UP]
        found = self.web.image_search(example.image).hits[:1]
        return [LOOK_IT_UP, *(look_up(hit.title.split()[0]) for hit in found)]


class Web:
    """The toy world's web, a search back-end.

    It sees picture bytes or words only. It finds the pictures that are on it, and the towns of names that are. Equal
    searches give equal results. Where retrieval is imperfect, a share `wrong` of the pictures lead to something else
    first, and so do the names of that same share of each pool's concepts.
    """

    def __init__(self, concepts: list[Concept], settings: Settings, seed: int):
        self.concepts, self.settings, self.seed = concepts, settings, seed
        self.names = {concept.name: concept for concept in concepts}
        self.pictures: dict[bytes, Concept] = {}
        self._seen: dict[bytes, Observation] = {}
        rng = np.random.default_rng([seed, 5])
        self.misleading: set[str] = set()  # names
        for pool in settings.pools:
            names = [concept.name for concept in concepts if concept.pool == pool.name]
            self.misleading.update(rng.choice(names, round(settings.wrong * len(names)), replace=False))

    def add(self, image: bytes, concept: Concept) -> None:
        self.pictures[hashlib.sha256(image).digest()] = concept

    def image_search(self, image: bytes, question: str = "", image_url: str = "") -> Observation:
        digest = hashlib.sha256(image).digest()
        concept = self.pictures.get(digest)
        if concept is None:
            return Observation(source="toy")
        if digest not in self._seen:
            rng = np.random.default_rng([self.seed, 3, *np.frombuffer(digest[:16], dtype=np.uint32)])
            about = self.about(concept, rng, misleading=rng.random() < self.settings.wrong)
            self._seen[digest] = Observation(self.hits(IMAGE_SEARCH, about, rng), source="toy")
        return self._seen[digest]

    def text_search(self, query: str) -> Observation:
        name = next((word for word in query.split() if word in self.names), None)
        if name is None:
            return Observation(source="toy")
        digest = hashlib.sha256(name.encode()).digest()
        rng = np.random.default_rng([self.seed, 6, *np.frombuffer(digest[:16], dtype=np.uint32)])
        about = self.about(self.names[name], rng, misleading=name in self.misleading)
        return Observation(self.hits(TEXT_SEARCH, about, rng), source="toy")

    def about(self, concept: Concept, rng: np.random.Generator, misleading: bool = False) -> list[Concept]:
        """What the results of a search for a concept are about, the first one first."""
        others = [misleading, *(rng.random(RESULTS - 1) < DISTRACTION)]
        return [self._another(concept, rng) if other else concept for other in others]

    def _another(self, concept: Concept, rng: np.random.Generator) -> Concept:
        other = concept
        while other.name == concept.name:
            other = self.concepts[rng.integers(len(self.concepts))]
        return other

    def hits(self, tool: str, about: Sequence[Concept], rng: np.random.Generator) -> tuple[Hit, ...]:
        """The results that a search shows for these concepts."""
        image = tool == IMAGE_SEARCH
        forms = TITLES if image and self.settings.two_hops else PAGES
        titles = [forms[rng.integers(len(forms))].format(name=c.name, town=c.town) for c in about]
        if not (image and self.settings.thumbnails):
            return tuple(Hit(title=title) for title in titles)
        pictures = render(np.stack([concept.emblem for concept in about]), rng)
        return tuple(Hit(title=title, image=png(picture)) for title, picture in zip(titles, pictures))
