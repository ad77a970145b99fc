"""docs/renting.md against the programs that compute its numbers, and the commands of docs/results.md as one chain."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "bench"))

import renting  # noqa: E402
import step_time  # noqa: E402
from test_docs import commands, read  # noqa: E402

from mmsr import plan as planning  # noqa: E402
from mmsr.config import parse  # noqa: E402
from mmsr.disk import disk_needed, downloads  # noqa: E402
from mmsr.plan import GIB, kept_as_fits, plan  # noqa: E402
from mmsr.pretrained.published import SIZES  # noqa: E402

PAGE = read("docs/renting.md")


@pytest.mark.slow
def test_the_renting_page_has_other_tables_than_its_program():
    assert renting.with_tables(PAGE) == PAGE, "python bench/renting.py --write docs/renting.md"
    assert all(f"<!-- {name} -->" in PAGE for name in renting.TABLES)


def cells() -> list[tuple[list[str], str]]:
    """The options of `python -m mmsr.plan` and what the page says, for each recipe in each cell of the first table."""
    found = []
    table = PAGE.split("<!-- fits -->")[1].split("<!-- end -->")[0]
    for model, trained, devices, *said in re.findall(
        r"^\| (\dB) \| (.*) \| (\d) \| (.*) \| (.*) \| (.*) \| (.*) \|$", table, re.MULTILINE
    ):
        for device, cell in zip(step_time.DEVICES, said, strict=True):
            for part in cell.split("; "):
                recipes, _, outcome = part.rpartition(": ")
                place = f"--gpus {devices} --gpu-gb {device.gib:g} --model Qwen2.5-VL-{model}".split()
                place += [*renting.TRAINED[trained].split(), "--recipe", recipes.split(", ")[0] or "blog"]
                found.append((place, outcome))
    return found


def test_the_plan_refuses_what_the_renting_page_says_or_the_other_way_round(capsys):
    """The cells with options, and one of the others in each row."""
    wrong = []
    for place, outcome in [*(cell for cell in cells() if "`" in cell[1]), *cells()[::5]]:
        options = outcome.strip("`").split() if "`" in outcome else []
        try:
            planning.main([*place, *options])
            fits = True
        except SystemExit as stop:
            assert stop.code == 1
            fits = False
        if fits != (outcome != "no"):
            wrong.append((place, outcome))
    assert not wrong and len(cells()) > 48


def test_the_page_says_that_a_card_is_too_small_for_adapters():
    """A 7B model on one card of 48 GB, 3B on one of 24; nothing of it changes what is learned."""
    alone = [(place, outcome) for place, outcome in cells() if renting.LORA.split()[0] in place and place[1] == "1"]
    fitting = {(place[5], place[3]): outcome for place, outcome in alone}
    for device in ("44", "79", "139"):
        assert fitting["Qwen2.5-VL-7B", device].startswith("**")
    assert set(re.findall(r"--[\w-]+", str([outcome for place, outcome in alone if place[5][-2:] == "3B"]))) == {
        "--slots"
    }


def test_the_scale_page_has_other_seconds_than_its_program():
    assert step_time.scale_table() in read("docs/scale.md")


def test_the_readme_has_other_hours_than_the_renting_page():
    seconds = step_time.step("Qwen2.5-VL-7B", step_time.recipe("blog"), 8).seconds
    hours = f"{seconds * 100 / 3600:.1f}"
    assert f"at least {hours} hours" in " ".join(read("README.md").split()) and f"| {hours} h, " in PAGE


@pytest.mark.slow
def test_the_shares_of_a_cards_rates_are_not_those_of_the_roofline():
    found = step_time.roofline_shares(shapes=["3B"])  # test_bench.py has the other shape
    assert found == {name: shares for name, shares in step_time.SHARES.items() if name[1].endswith("3B")}


def test_the_renting_page_tells_other_assumptions_than_its_program():
    text = " ".join(PAGE.split())
    sizes = [f"{device.gib:g}" for device in step_time.DEVICES]
    assert f"{', '.join(sizes[:-1])} and {sizes[-1]} GiB" in text
    assert all(f"${price:.2f}" in text for price in renting.PRICES.values())
    assert f"${renting.IMAGE} an image search" in text and f"{renting.CALLS} paid calls" in text


def smoke_run() -> list[str]:
    """The command line of the first half hour's run, from train.py on."""
    (line,) = [line for line in commands(PAGE) if line.endswith("--out runs/smoke")]
    return line.split("train.py ")[1].split()


def test_the_smoke_run_takes_other_memory_and_disk_than_the_page_says_or_less_than_the_real_one():
    config = parse(smoke_run())
    model = SIZES["Qwen2.5-VL-7B"]
    room = 79 * GIB
    kept = kept_as_fits(model, config, room, 8)
    assert f"Memory plan: at most {plan(model, kept, 8).peak / GIB:.1f} of 79." in PAGE
    assert f"({sum(disk_needed(config, model, 8).values()) / 1e9:.0f} GB)" in PAGE
    free = sum(disk_needed(config, model, 8).values()) + sum(downloads(config, model).values())
    whole = [step_time.recipe(name) for name in renting.RECIPES]
    most = max(sum(disk_needed(one, model, 8).values()) + sum(downloads(one, model).values()) for one in whole)
    promised = re.search(r"(\d+) GB of free disk \(the real run takes (\d+) with", " ".join(PAGE.split()))
    assert [0 <= float(said) - need / 1e9 < 10 for said, need in zip(promised.groups(), (free, most))] == [True, True]
    real = plan(model, step_time.recipe("blog"), 8)
    assert plan(model, config, 8).moments.update == real.moments.update
    assert plan(model, config, 8).moments.generate > 0.98 * real.moments.generate


def test_the_first_half_hour_quotes_what_no_program_prints():
    sources = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "mmsr").rglob("*.py"))
    first = "Memory plan: at most ", "The backward pass recomputes "
    then = "Go on with --resume.", "Resumed after step ", "Written in "
    for words in first + then:
        assert words in sources and words in " ".join(PAGE.split()), words


def test_the_script_ends_before_a_save_is_through():
    """What torchrun waits for lies within what SLURM gives."""
    warned = int(re.search(r"--signal=TERM@(\d+)", PAGE)[1])
    waits = {int(seconds) for seconds in re.findall(r"--shutdown-timeout (\d+)", PAGE)}
    assert len(waits) == 1 and 30 < waits.pop() < warned
    assert {"--cpus-per-task", "--mem", "--time", "--requeue"} <= set(re.findall(r"--[a-z-]+", PAGE))


def test_a_command_of_the_results_page_reads_what_no_command_before_it_has_written():
    part = read("docs/results.md").split("## The real thing")[1].split("\n## ")[0]
    there = set()
    listed = [line for line in commands(part) if line.split()[0] in ("hf", "python", "torchrun") and "/" in line]
    assert len(listed) == 7
    for line in listed:
        words = re.sub(r"replay:", "", line).split()
        writes = {words[i + 1] for i, word in enumerate(words) if word in ("--out", "--local-dir", "--search-cache")}
        read_files = {word for word in words[1:] if re.search(r"\.(sqlite|parquet|pkl)$|^runs/", word)} - writes
        missing = {file for file in read_files if not any(file == t or file.startswith(f"{t}/") for t in there)}
        assert not missing, line
        there |= writes
    models = set(re.findall(r"--model (Qwen[\w.-]+)", part))
    assert all(f"hf download Qwen/{model}-Instruct" in part for model in models)


def test_a_step_is_priced_as_if_all_blocks_were_recomputed_or_a_device_alone_had_traffic():
    """All blocks kept is the fastest; a device alone has no traffic."""
    config = parse(["--model", "x", "--recipe", "paper", "--no-recompute"])
    kept = step_time.step("Qwen2.5-VL-7B", config, 8)
    assert kept.train < step_time.step("Qwen2.5-VL-7B", step_time.recipe("paper"), 8).train
    assert step_time.step("Qwen2.5-VL-3B", config, 1).traffic == 0
