"""The tables of docs/renting.md: what fits, what it needs beside a GPU, how long it takes, what it costs.

    python bench/renting.py                           # print them
    python bench/renting.py --write docs/renting.md   # put them into the page, each between its two marks

All of it is computed: memory by mmsr/plan.py, disk and downloads by mmsr/disk.py, hours by bench/step_time.py, which
takes its rates from bench/roofline.py. PRICES and what a search costs are assumptions, made in November 2026.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from functools import lru_cache
from pathlib import Path
from typing import Callable, Sequence

import step_time
from step_time import DEVICES, Device, recipe, rollouts

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mmsr.config import Config, parse  # noqa: E402
from mmsr.disk import disk_needed, downloads, save_bytes  # noqa: E402
from mmsr.plan import GIB, USABLE, advise, decided, host_memory, plan  # noqa: E402
from mmsr.pretrained.published import SIZES  # noqa: E402

MODELS = ("Qwen2.5-VL-3B", "Qwen2.5-VL-7B")
COUNTS = (1, 4, 8)
RECIPES = ("blog", "paper", "released")
LORA = "--lora 64"
TRAINED = {"all weights": "", "LoRA 64": LORA}  # the options that say so
MOST_OPTIONS = 3  # a run that needs more of them is another run
PRICES = {24: 0.50, 48: 1.00, 80: 2.50, 141: 3.50}  # dollars an hour of a device

# Dollars of a search.
IMAGE = 0.015  # by SerpApi: $75 for 5,000
PAGES = 5  # that a text search reads
TEXT = 0.001 + PAGES * (0.0002 + 0.0014)  # Serper's list, and for each page Jina Reader and a small model's summary
CALLS = 1 + 2 * PAGES  # that --budget counts for a text search
TRAINING_PICTURES, TEST_QUESTIONS = 5000, 1800  # of FVQA


@lru_cache
def options(model: str, name: str, devices: int, device: Device, trained: str = "") -> str | None:
    """What makes a recipe fit: "" where it fits as it is, None where it does not. `trained`: a value of TRAINED."""
    config, room = with_options(name, trained), device.gib * GIB
    if least(model, name, devices, device, trained) <= USABLE * room:
        return ""
    found = advise(SIZES[model], config, room, devices).options
    return found if found and found.count("--") <= MOST_OPTIONS else None


def least(model: str, name: str, devices: int, device: Device, trained: str = "") -> float:
    """Bytes on each device, with every block recomputed."""
    config = decided(SIZES[model], with_options(name, trained), device.gib * GIB, devices)
    return plan(SIZES[model], config, devices).peak


@lru_cache
def with_options(name: str, found: str) -> Config:
    """A recipe with options as they are typed."""
    return parse(["--model", "x", "--recipe", name, *found.split()])


def short(model: str) -> str:
    return model.removeprefix("Qwen2.5-VL-")


def row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def table(head: Sequence[object], rows: Sequence[str]) -> str:
    return "\n".join([row(*head), "|" + "---|" * len(head), *rows])


# ---- the tables


def fits() -> str:
    """Which recipes fit on which devices, by which options."""
    rows = []
    for model in MODELS:
        for trained, typed in TRAINED.items():
            for devices in COUNTS:
                cells = [fit(model, devices, device, typed) for device in DEVICES]
                rows.append(row(short(model), trained, devices, *cells))
    return table(["model", "trained", "devices", *(f"{device.gigabytes} GB" for device in DEVICES)], rows)


def fit(model: str, devices: int, device: Device, trained: str) -> str:
    """A cell: GiB of the largest recipe where all fit; else recipes that need the same options stand together."""
    together: dict[str | None, list[str]] = {}
    for name in RECIPES:
        together.setdefault(options(model, name, devices, device, trained), []).append(name)
    if list(together) == [""]:
        largest = max(least(model, name, devices, device, trained) for name in RECIPES)
        return f"**{largest / GIB:.1f}**"
    if len(together) == 1:
        return said(next(iter(together)))
    return "; ".join(f"{', '.join(names)}: {said(found)}" for found, names in together.items())


def said(found: str | None) -> str:
    if found is None:
        return "no"
    return f"`{found}`" if found else "yes"


def machine() -> str:
    """Host memory, downloads and disk by model and recipe."""
    numbers = ["download, GB", "a save, GB", "disk, GB", "host GiB: 1 device", "4 devices", "8 devices"]
    rows = []
    for model in MODELS:
        sizes = SIZES[model]
        for trained, typed in TRAINED.items():
            for name in RECIPES:
                config = with_options(name, typed)
                fetched = sum(downloads(config, sizes).values())
                bytes_ = [fetched, save_bytes(config, sizes, 8), sum(disk_needed(config, sizes, 8).values())]
                hosts = [sum(host_memory(sizes, config, devices).values()) for devices in COUNTS]
                cells = [f"{size / 1e9:.0f}" for size in bytes_] + [f"{size / GIB:.0f}" for size in hosts]
                rows.append(row(short(model), trained, name, *cells))
    return table(["model", "trained", "recipe", *numbers], rows)


def hours() -> str:
    """Hours of a run, and dollars for its devices, wherever one of the recipes fits."""
    places = [(devices, device) for device in DEVICES for devices in COUNTS]
    rows = []
    used = [place for place in places if any_fits(*place)]
    for model in MODELS:
        for trained, typed in TRAINED.items():
            for name in RECIPES:
                cells = [hours_and_dollars(model, name, typed, *place) for place in used]
                rows.append(row(short(model), trained, name, *cells))
    head = [f"{devices} × {device.gigabytes} GB" for devices, device in used]
    return table(["model", "trained", "recipe", *head], rows)


def any_fits(devices: int, device: Device) -> bool:
    """Whether any recipe fits there, for any model, however it is trained."""
    runs = itertools.product(MODELS, RECIPES, TRAINED.values())
    return any(options(model, name, devices, device, typed) is not None for model, name, typed in runs)


def hours_and_dollars(model: str, name: str, trained: str, devices: int, device: Device) -> str:
    """`trained`: a value of TRAINED."""
    found = options(model, name, devices, device, trained)
    if found is None:
        return "–"
    config = with_options(name, f"{trained} {found}")
    spent = step_time.step(model, config, devices, device).seconds * config.steps / 3600
    return f"{spent:.1f} h, ${spent * devices * PRICES[device.gigabytes]:.0f}"


def searches() -> str:
    """Paid calls and dollars of a run's searches, at most and with a text search in half of the rollouts."""
    head = ["run", "image searches", "text searches, at most", "paid calls", "$", "paid calls if half search once", "$"]
    rows = []
    for name in RECIPES:
        config = recipe(name)
        most = rollouts(config) * config.max_texts
        half = rollouts(config) // 2 if most else 0
        rows.append(row(name, "0", *bill(0, most), *bill(0, half)[1:]))
    evaluations = {"search": (2 * TEST_QUESTIONS, TEST_QUESTIONS // 2), "rag": (TEST_QUESTIONS, TEST_QUESTIONS)}
    for mode, (most, half) in evaluations.items():
        cells = [*bill(TEST_QUESTIONS, most), *bill(TEST_QUESTIONS, half)[1:]]
        rows.append(row(f"evaluation on FVQA-test, `--mode {mode}`", f"{TEST_QUESTIONS:,}", *cells))
    return table(head, rows)


def bill(images: int, texts: int) -> list[str]:
    """Text searches, calls that --budget counts, dollars."""
    return [f"{texts:,}", f"{images + CALLS * texts:,}", f"{IMAGE * images + TEXT * texts:,.0f}"]


TABLES: dict[str, Callable[[], str]] = {"fits": fits, "machine": machine, "hours": hours, "searches": searches}


def with_tables(page: str) -> str:
    """A page with the tables of today between `<!-- NAME -->` and `<!-- end -->`."""
    for name, make in TABLES.items():
        before, mark, rest = page.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        page = f"{before}{mark}{make()}\n{end}{after}"
    return page


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", metavar="PAGE", help="put the tables into this page")
    page = parser.parse_args(argv).write
    if page:
        Path(page).write_text(with_tables(Path(page).read_text(encoding="utf-8")), encoding="utf-8")
        return
    print(*(make() for make in TABLES.values()), sep="\n\n")


if __name__ == "__main__":
    main()
