"""The questions of a run: the toy world's, and those of files, which may have to be fetched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from mmsr.config import Config, EvalConfig, Options
from mmsr.data import fvqa
from mmsr.data.formats import Dataset, read_examples
from mmsr.episode import Example
from mmsr.system.errors import UserError
from mmsr.system.images import decode
from mmsr.system.parallel import Ranks
from mmsr.system.progress import progress
from mmsr.toy import world as toy


@dataclass
class Questions:
    """The questions of a run by the option that names them, as messages quote it: `--data FILE`."""

    by_option: Mapping[str, Sequence[Example]]
    train: Sequence[Example] = ()
    evaluation: Sequence[Example] = ()  # of the evaluations within training


def open_world(config: Options) -> toy.World | None:
    """The toy world. None where neither questions nor searches nor the model are of it."""
    if "toy" in (*config.datasets, *config.back_ends.values()) or not config.model:
        return toy.World(config.seed, toy.SETTINGS[config.toy])
    return None


def fetch_file(name: str, ranks: Ranks) -> str:
    """The file on this machine that --data or --eval-data names. What does not name a file on the hub is kept."""
    found = fvqa.hub_file(name)
    if found is None:
        return name
    repository, file = found
    return fetch(name, repository, file, ranks)


def fetch(name: str, repository: str, file: str, ranks: Ranks) -> str:
    """A file of the hub, fetched by the main rank, then found by the others. Collective."""
    ranks.print(f"Finding {name} in the cache of the Hugging Face hub, or fetching it.")
    return str(ranks.main_process_first(f"fetch {name}", partial(fvqa.fetched_file, repository, file)))


def open_questions(config: Config, world: toy.World | None, ranks: Ranks) -> Questions:
    """The questions of training, and those of the evaluations within it: fresh toy pictures, or the first of --data."""
    data = fetch_file(config.data, ranks)
    eval_data = fetch_file(config.eval_data, ranks)
    layout = Layout(config.format, config.columns, config.images)
    with ranks.sync_errors():
        if config.data == "toy":
            train = world.train
        else:
            train = read_questions(data, layout, ranks)
        if config.eval_data and config.eval_data != "toy":
            evaluation = first(config.eval_size, read_questions(eval_data, layout, ranks))
        elif world and "toy" in (config.data, config.eval_data):
            evaluation = toy_questions(world, config.eval_size)
        else:
            evaluation = first(config.eval_size, train)
    by_option = {f"--data {config.data}": train, f"--eval-data {config.eval_data or config.data}": evaluation}
    return Questions(by_option, train, evaluation)


def open_data_sets(config: EvalConfig, world: toy.World | None, ranks: Ranks) -> dict[str, Sequence[Example]]:
    """The questions of an evaluation, by the name that --data gives."""
    files = {name: fetch_file(name, ranks) for name in config.data}
    layout = Layout(config.format, config.columns, config.images)
    data_sets: dict[str, Sequence[Example]] = {}
    with ranks.sync_errors():
        for name in config.data:
            if name == "toy":
                data_sets[name] = toy_questions(world, config.limit or 200)
            else:
                data_sets[name] = read_questions(files[name], layout, ranks, config.limit)
    return data_sets


class Layout(NamedTuple):
    """How questions are written in a file, as the options of these names say."""

    format: str
    columns: str
    images: str


def read_questions(file: str, layout: Layout, ranks: Ranks, limit: int = 0) -> Dataset:
    """The questions of a file that have a picture, the first `limit` of them unless that is 0.

    Raises UserError where there is none, and for a picture that cannot be opened: the ranks share this check.
    """
    questions = read_examples(file, layout.format, layout.columns, layout.images)
    if not len(questions):
        raise UserError(f"{file}: there is no question with a picture in it; give a file with at least one")
    if questions.left_out:
        some = f"{questions.left_out} of {len(questions.table)} questions"
        why = "have not just one picture" if questions.layout.pictures else "have no picture"
        ranks.print(f"{file}: {some} {why} and are left out.")
    for note in questions.notes:
        ranks.print(f"{file}: {note}.")
    if limit:
        questions.keep(range(min(limit, len(questions))))
    ranks.print(f"{file}: opening the pictures of {len(questions):,} questions.")
    for place in my_places(len(questions), ranks, "opening pictures", "picture"):
        try:
            decode(questions[place].image)
        except ValueError as error:
            raise UserError(f"{file}: row {questions.rows[place]}: {error}; mend or remove this row") from None
    return questions


def my_places(count: int, ranks: Ranks, doing: str, unit: str) -> Iterator[int]:
    """Every `ranks.size`-th of the numbers below `count`: this rank's share. The main rank shows how far it is."""
    mine = range(ranks.rank, count, ranks.size)
    with progress(doing, len(mine), unit, shown=ranks.main) as bar:
        for place in mine:
            yield place
            bar.update()


def first(n: int, questions: Sequence[Example]) -> list[Example]:
    """The first `n` questions, or as many as there are. A data set has no slices."""
    return [questions[i] for i in range(min(n, len(questions)))]


def toy_questions(world: toy.World, n: int) -> list[Example]:
    """`n` questions of each category about fresh pictures."""
    questions: list[Example] = []
    for category in world.settings.categories:
        questions += world.questions(category, n, "eval")
    return questions
