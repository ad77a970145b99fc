"""The page of a run: that it says what the files say, that nothing in them is markup, and that a browser shows it."""

import http.server
import io
import json
import random
import re
import shutil
import subprocess
import threading

import pytest

from mmsr.evaluate import NEEDS_NO_SEARCH, NEEDS_SEARCH, overall
from mmsr.report import html as report
from mmsr.report.html import write_report
from mmsr.system.errors import UserError
from mmsr.toy.world import SETTINGS

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
PNG = b"\xff\xd8 not a picture, but nobody looks \xff\xd9"


def rollout(group=0, sample=0, **changes) -> dict:
    tool = {"role": "tool", "text": "\nfound", "action": "image_search", "query": ""}
    tool["observation"] = {"ok": True, "error": None, "source": "toy", "titles": ["A title"], "text": "", "images": 0}
    tool["observation"] |= {"urls": ["https://example.org/page"], "thumbnails": [None], "seconds": 0.1, "cached": False}
    looks = {"role": "assistant", "text": "<reason> hm </reason> <search><img></search>", "action": "image_search"}
    says = {"role": "assistant", "text": "<reason> so </reason> <answer> Tagus </answer>", "action": "answer"}
    says |= {"query": "Tagus", "pieces": [["<reason>", 1, 0.99], [" so", 1, 0.004]]}
    made = {"id": "e1", "group": group, "sample": sample, "question": "which river ?", "answers": ["Tagus"]}
    made |= {"category": "new", "status": "answered", "turns": [{**looks, "query": ""}, tool, says], "answer": "Tagus"}
    made |= {"reward": 0.91, "reward_parts": {"accuracy": 1.0}, "advantage": 0.5, "tokens": {"total": 9, "sampled": 4}}
    return made | changes


def step(number, **changes) -> dict:
    made = {"step": number, "reward": 0.5 + number / 100, "accuracy": 0.6, "search_ratio": 0.5, "logp_gap": 1e-7}
    return made | {"seconds": {"rollout": 1.5, "update": 2.5}, "lr": 1e-6} | changes


def evaluation(number, accuracy) -> dict:
    found = {"new": {"n": 4, "accuracy": accuracy, "search_ratio": 1.0, "reward": 0.9}}
    return {"step": number, "eval": found, "eval_sampled": found}


def a_run(folder, steps: dict[int, list[dict]], lines=None):
    (folder / "rollouts").mkdir(parents=True)
    lines = (
        [evaluation(0, 0.25), *map(step, steps), evaluation(max(steps, default=0), 0.75)] if lines is None else lines
    )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for number, rollouts in steps.items():
        file = folder / "rollouts" / f"step-{number:06d}.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in rollouts))
    return folder


def embedded(page) -> dict:
    return json.loads(re.search(r'id="data">(.*?)</script>', page.read_text(encoding="utf-8"), re.DOTALL)[1])


# ---- what it says


def test_rare_turn_shapes_get_colours_that_others_have(tmp_path):
    """The page has eight colours; a toy run has two dozen shapes, most of them in one rollout."""
    rare = [rollout(i, turns=rollout()["turns"][:2] * i + rollout()["turns"][2:]) for i in range(2, 12)]
    columns = embedded(write_report(a_run(tmp_path / "run", {1: [*rare[:5], *[rollout()] * 10], 2: rare[5:]})))
    shares = {name: x for name, x in columns["runs"][0]["columns"].items() if name.startswith("shape/")}
    assert len(shares) == 8 and list(shares)[0] == "shape/image → answer" and list(shares)[-1] == "shape/others"
    assert [round(sum(column), 4) for column in zip(*shares.values())] == [1, 1], "nothing is left out"


def test_password_of_an_older_runs_teacher_stands_in_the_page(tmp_path):
    folder = a_run(tmp_path / "run", {1: [rollout()]})
    options = {"teacher": "https://me:canary-0123@m.example/v1?key=canary-4567", "steps": 3}
    options |= {"data": ["a", "https://me:canary-89@m.example"]}
    (folder / "config.json").write_text(json.dumps(options))
    page = write_report(folder)
    assert "canary" not in page.read_text(encoding="utf-8")
    assert embedded(page)["runs"][0]["config"] == options | {
        "teacher": "https://[key]@m.example/v1?[key]",
        "data": ["a", "https://[key]@m.example"],
    }


def test_curves_tables_and_rollouts_are_those_of_the_files(tmp_path):
    direct = rollout(0, 1, category="old", turns=rollout()["turns"][2:])
    folder = a_run(tmp_path / "run", {1: [rollout(), direct], 2: [rollout(), rollout(0, 1, status="invalid")]})
    page = write_report(folder)
    assert page == folder / "report.html" and not list(folder.glob(".*"))
    (run,) = embedded(page)["runs"]
    columns = run["columns"]
    assert columns["step"] == [1, 2] and columns["reward"] == [0.51, 0.52] and columns["seconds/update"] == [2.5, 2.5]
    assert columns["shape/image → answer"] == [0.5, 0.5] and columns["shape/answer"] == [0.5, 0]
    assert columns["shape/image → answer → (invalid)"] == [0, 0.5]
    assert columns["search/new"] == [1, 1] and columns["search/old"] == [0, None]
    names = ["before, greedy", "after, greedy", "before, T = 1", "after, T = 1"]
    assert [row["name"] for row in run["tables"]] == names
    assert [row["by"]["new"]["accuracy"] for row in run["tables"]] == [0.25, 0.75, 0.25, 0.75]
    assert [(r["step"], r["group"], r["sample"]) for r in run["rollouts"]] == [
        (1, 0, 0),
        (1, 0, 1),
        (2, 0, 0),
        (2, 0, 1),
    ]
    assert {key: run["rollouts"][0][key] for key in rollout()} == rollout()


def answers(right: bool, searches: int, reward: float, **changes) -> dict:
    """A rollout that answers rightly or wrongly after some searches."""
    turns = rollout()["turns"]
    made = rollout(turns=turns[:2] * searches + turns[2:], reward=reward, reward_parts={"accuracy": float(right)})
    return made | {"answer": "Tagus" if right else "Douro"} | changes


@pytest.mark.parametrize(
    "steps, chosen, why",
    [  # the place of the rollout that tells most: step, group, sample
        (
            {1: [answers(True, 1, 0.91), answers(False, 0, 0.1, sample=1)], 2: [answers(True, 1, 0.91)]},
            (1, 0, 0),
            "paid",
        ),
        ({1: [rollout()], 2: [answers(False, 0, 0.1), answers(True, 1, 0.91, sample=1)]}, (2, 0, 1), "paid"),
        (
            {
                1: [answers(False, 0, 0.1), answers(True, 1, 0.91, sample=1), answers(True, 2, 0.91, sample=2)],
                2: [answers(False, 0, 0.1), answers(True, 1, 0.91, sample=1), answers(True, 0, 1.0, sample=2)],
            },
            (1, 0, 2),
            "paid",
        ),
        ({1: [rollout(), answers(True, 0, 1.0, group=1)]}, (1, 0, 0), "after a search;"),
        ({1: [answers(False, 1, 0.1), answers(True, 0, 1.0, group=1)]}, (1, 1, 0), "a right answer;"),
        ({1: [answers(False, 0, 0.1), answers(False, 1, 0.1, sample=1)]}, (1, 0, 1), "no answer is right"),
        (
            {1: [rollout(reward="high", reward_parts=7), rollout(1, reward_parts=None, reward=None)]},
            (1, 0, 0),
            "no answer",
        ),
    ],
)
def test_the_page_opens_with_an_attempt_that_tells_nothing(tmp_path, steps, chosen, why):
    (run,) = embedded(write_report(a_run(tmp_path / "run", steps)))["runs"]
    found = run["rollouts"][run["telling"]["index"]]
    assert (found["step"], found["group"], found["sample"]) == chosen
    assert why in run["telling"]["why"]


def test_a_run_without_rollouts_opens_with_one(tmp_path):
    (run,) = embedded(write_report(a_run(tmp_path / "run", {}, [step(1)])))["runs"]
    assert run["telling"] is None


def test_a_category_of_the_toy_worlds_is_not_explained():
    explained = report.PAGE.read_text(encoding="utf-8").split("const CATEGORIES")[1].split("]);")[0]
    categories = {category.name for world in SETTINGS.values() for category in world.categories}
    for name in categories | NEEDS_SEARCH | NEEDS_NO_SEARCH:
        assert f'["{name}", "' in explained


def test_the_page_and_the_terminal_have_other_means_of_an_evaluation(tmp_path):
    found = {name: {"n": 2, "accuracy": x} for name, x in (("familiar", 1.0), ("unfamiliar", 0.25), ("held_out", 0.5))}
    folder = a_run(tmp_path / "run", {1: [rollout()]}, [step(1), {"step": 1, "eval": found}])
    (folder / "config.json").write_text(json.dumps({"data": "toy", "toy": "basic"}))
    (table,) = embedded(write_report(folder))["runs"][0]["tables"]
    assert table["mix"] == SETTINGS["basic"].mix
    shown = dom(tmp_path, folder / "report.html")
    assert overall(found, table["mix"], ["accuracy"]) == {"accuracy": 0.6875} and "<td>.688</td>" in shown
    assert "“all” weights them as training does." in shown


def test_evaluation_folder_has_its_table_and_its_episodes(tmp_path):
    by = {"new": {"n": 1, "accuracy": 1.0, "search_ratio": 1.0}}
    results = {"fvqa": {"n": 1, "accuracy": 1.0, "search_ratio": 1.0, "by_category": by}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    (tmp_path / "episodes.jsonl").write_text(json.dumps(rollout()) + "\n")
    (run,) = embedded(write_report(tmp_path))["runs"]
    assert run["tables"] == [{"name": "fvqa", "step": None, "by": by, "all": results["fvqa"]}]
    assert len(run["rollouts"]) == 1 and run["columns"] == {}


def test_too_many_rollouts_are_thinned_by_whole_groups_all_along_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "MOST_ROLLOUTS", 60)
    steps = {n: [rollout(g, s) for g in range(5) for s in range(4)] for n in range(1, 11)}
    (run,) = embedded(write_report(a_run(tmp_path / "run", steps)))["runs"]
    groups = {}
    for kept in run["rollouts"]:
        groups.setdefault((kept["step"], kept["group"]), []).append(kept["sample"])
    assert run["total"] == 200 and len(groups) == 15 and all(samples == [0, 1, 2, 3] for samples in groups.values())
    assert len({number for number, _ in groups}) == 10
    assert run["columns"]["shape/image → answer"] == [1] * 10, "curves count all"


def big_run(folder, steps=12, groups=40, members=6, told=True):
    """Rollouts of unequal lengths, longer where tokens are written, some 4 MB; only every fourth group searches."""
    dice = random.Random(0)
    written = {
        n: [
            rollout(
                g,
                s,
                question="why " * dice.randint(1, 600 if g < 5 else 250),
                turns=rollout()["turns"][2 * (g % 4 > 0) :],
            )
            for g in range(groups)
            for s in range(members)
        ]
        for n in range(1, steps + 1)
    }
    n = groups * members
    counts = {"status": {"answered": n}, "shapes": {"image → answer": n // 4, "answer": n - n // 4}}
    counts["by_category"] = {"new": {"n": n, "search_ratio": 0.25}}
    return a_run(folder, written, [step(n, **(counts if told else {})) for n in written])


class Counted(io.FileIO):
    """A file that adds up the bytes that are read."""

    read_so_far = 0

    def readinto(self, room):
        n = super().readinto(room)
        Counted.read_so_far += n
        return n


def test_a_report_of_a_long_run_reads_and_parses_every_rollout(tmp_path, monkeypatch):
    """It is written after SIGTERM too, where torchrun waits 30 seconds: the blog's runs have 16 GB of rollouts."""
    folder, most = big_run(tmp_path / "run"), 150_000
    rollout_bytes = sum(file.stat().st_size for file in folder.glob("rollouts/*"))
    parsed, parse = [], report._parsed
    monkeypatch.setattr(report, "open", lambda path, _: io.BufferedReader(Counted(path), 1024), raising=False)
    monkeypatch.setattr(report, "_parsed", lambda data: parsed.append(data) or parse(data))
    monkeypatch.setattr(report, "MOST_ROLLOUT_BYTES", most)
    monkeypatch.setattr(Counted, "read_so_far", 0)
    (run,) = embedded(write_report(folder))["runs"]
    assert rollout_bytes > 20 * most and run["total"] == 12 * 240
    parsed = parsed[12:]  # behind the lines of metrics.jsonl
    assert len(parsed) == len(run["rollouts"]) and 0.6 * most < sum(map(len, parsed)) <= most
    assert Counted.read_so_far < 3 * most, "of the others no more than what lies between"


def test_thinned_rollouts_are_halves_of_groups_or_of_some_steps_only(tmp_path, monkeypatch):
    folder = big_run(tmp_path / "run")
    for name, most in [("MOST_ROLLOUT_BYTES", 300_000), ("MOST_ROLLOUTS", 300), ("MOST_ROLLOUTS", 10)]:
        with monkeypatch.context() as patch:
            patch.setattr(report, name, most)
            (run,) = embedded(write_report(folder))["runs"]
        groups = {}
        for kept in run["rollouts"]:
            groups.setdefault((kept["step"], kept["group"]), []).append(kept["sample"])
        assert all(samples == [0, 1, 2, 3, 4, 5] for samples in groups.values())
        assert name == "MOST_ROLLOUT_BYTES" or 0 < len(run["rollouts"]) <= most
        steps = [number for number, _ in groups]
        assert most == 10 or {steps.count(n) for n in range(1, 13)} <= {1, 2, 3, 4, 5, 6}


@pytest.mark.parametrize("told", [True, False])
def test_curves_of_a_thinned_run_count_only_what_is_embedded(tmp_path, monkeypatch, told):
    """Unless metrics.jsonl is of an older version; then the page says so."""
    monkeypatch.setattr(report, "MOST_ROLLOUTS", 12 * 12)
    (run,) = embedded(write_report(big_run(tmp_path / "run", told=told)))["runs"]
    assert 0 < len(run["rollouts"]) <= 144 and run["total"] == 12 * 240
    columns = [run["columns"][name] for name in ("shape/image → answer", "shape/answer", "search/new")]
    exact = [[x] * 12 for x in (0.25, 0.75, 0.25)]
    assert (columns == exact) == told and run["guessed"] == (not told)


def test_embedded_bytes_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "MOST_ROLLOUT_BYTES", 100_000)
    steps = {1: [rollout(g, 0, question="why " * 500) for g in range(200)]}
    size = write_report(a_run(tmp_path / "run", steps)).stat().st_size - report.PAGE.stat().st_size
    assert 60_000 < size < 110_000


def test_pictures_are_embedded_once_and_within_bounds(tmp_path, monkeypatch):
    names = [f"{n:016x}" for n in range(4)]
    rollouts = [rollout(0, n, image=name) for n, name in enumerate([*names, names[0], "../../secret"])]
    folder = a_run(tmp_path / "run", {1: rollouts})
    (folder / "images").mkdir()
    for name in names[:3]:
        (folder / "images" / f"{name}.jpg").write_bytes(PNG)
    monkeypatch.setattr(report, "MOST_PICTURE_BYTES", 2 * len(PNG))
    found = embedded(write_report(folder))
    assert list(found["pictures"]) == names[:2] and found["pictures_missing"] == 2
    assert all(url.startswith("data:image/jpeg;base64,") for url in found["pictures"].values())


def test_pictures_of_the_first_steps_leave_no_room_for_those_that_a_reader_sees_first(tmp_path, monkeypatch):
    """The page opens with one rollout, here of step 2, and lists the last step first."""
    names = [f"{n:016x}" for n in range(4)]
    steps = {n + 1: [rollout(image=name, reward_parts={"accuracy": float(n == 1)})] for n, name in enumerate(names)}
    folder = a_run(tmp_path / "run", steps)
    (folder / "images").mkdir()
    for name in names:
        (folder / "images" / f"{name}.jpg").write_bytes(PNG)
    monkeypatch.setattr(report, "MOST_PICTURE_BYTES", 3 * len(PNG))
    assert list(embedded(write_report(folder))["pictures"]) == [names[1], names[3], names[2]]


def test_half_written_files_give_what_is_whole(tmp_path, capsys):
    folder = a_run(tmp_path / "run", {1: [rollout()]})
    for file in (folder / "metrics.jsonl", folder / "rollouts/step-000001.jsonl"):
        file.write_text(file.read_text() + '{"step": 9, "rew')
    (run,) = embedded(write_report(folder))["runs"]
    assert run["columns"]["step"] == [1] and len(run["rollouts"]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "metrics.jsonl, line 4, and 1 more" in said
    write_report(folder)
    assert not capsys.readouterr().err, "a run rewrites its report all the time"


NO_ROLLOUTS = [
    *("5", "null", '{"group": 0, "turns": 7}', "[" * 100_000, '{"group": ' + "9" * 5000 + "}", "\x00" * 40),
    json.dumps(rollout(turns=None)),
    json.dumps(rollout(turns=["said"])),
    json.dumps(rollout(turns=[{"role": "tool", "observation": "found"}])),
    json.dumps(rollout(turns=[{"role": "tool", "observation": {"thumbnails": [7]}}])),
    json.dumps(rollout(turns=[{"role": "assistant", "action": 3}])),
    json.dumps(rollout(category=["new"])),
    json.dumps(rollout(answers=7)),
    json.dumps(rollout(turns=[{"role": "assistant", "text": 7}])),
    *(json.dumps(rollout(turns=[{"role": "assistant", "pieces": pieces}])) for pieces in (7, ["so"], [["so", 1]])),
    json.dumps(rollout(turns=[{"role": "tool", "observation": {"titles": "found"}}])),
]
NO_METRICS = [
    *(
        "[]",
        '{"reward": 0.5}',
        json.dumps(step(3, step=[3])),
        json.dumps(step(3, step="3")),
        json.dumps(step(3, seconds=2.0)),
    ),
    *(json.dumps(step(3, status={"answered": "all"})), json.dumps(step(3, shapes=["answer"]))),
    json.dumps(step(3, by_category={"new": 4})),
    *(json.dumps(step(3, reward=value)) for value in ("high", [1], {"a": 1})),
]


@pytest.mark.parametrize(
    "name, line",
    [*(("rollouts/step-000001.jsonl", x) for x in NO_ROLLOUTS), *(("metrics.jsonl", x) for x in NO_METRICS)],
)
def test_damaged_line_of_a_run_ends_in_a_traceback_or_is_left_out_in_silence(tmp_path, capsys, name, line):
    folder = a_run(tmp_path / "run", {1: [rollout(), rollout(0, 1)]})
    lines = (folder / name).read_text().splitlines()
    (folder / name).write_text("\n".join([lines[0], line, *lines[1:]]) + "\n")
    report.main([str(folder)])
    (run,) = embedded(folder / "report.html")["runs"]
    assert run["columns"]["step"] == [1] and len(run["rollouts"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"{folder / name}, line 2\n" in said


def test_infinite_number_or_damaged_file_ends_a_report(tmp_path, capsys):
    folder = a_run(tmp_path / "run", {1: [rollout()]}, [step(1)])
    (folder / "metrics.jsonl").write_text(json.dumps(step(1)).replace("1e-07", "1e999") + "\n")
    (folder / "config.json").write_text('{"recipe": "to')
    (run,) = embedded(write_report(folder))["runs"]
    assert run["columns"]["logp_gap"] == [None] and run["config"] == {}
    assert f"damaged data: {folder / 'config.json'}\n" in capsys.readouterr().err


def test_the_line_of_damage_is_counted_from_where_a_thinned_report_reads(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "MOST_ROLLOUTS", 60)
    folder = a_run(tmp_path / "run", {1: [rollout(g) for g in range(400)]})
    file = folder / "rollouts/step-000001.jsonl"
    whole = file.read_text().splitlines()
    file.write_text("\n".join(whole[:200] + [line.replace("turns", "runts") + "?" for line in whole[200:]]) + "\n")
    write_report(folder)
    number = int(re.search(r"line (\d+)", capsys.readouterr().err)[1])
    assert 200 < number < 215


def test_a_file_as_editors_leave_it_is_damaged(tmp_path, capsys):
    folder = a_run(tmp_path / "run", {1: [rollout(), rollout(0, 1)]})
    for file in (folder / "metrics.jsonl", folder / "rollouts/step-000001.jsonl"):
        file.write_text("\ufeff" + file.read_text().replace("\n", "\r\n\r\n") + "  \r\n")
    (run,) = embedded(write_report(folder))["runs"]
    assert run["columns"]["step"] == [1] and len(run["rollouts"]) == 2 and not capsys.readouterr().err


@pytest.mark.parametrize("make", [lambda file: file.mkdir(), lambda file: file.symlink_to("nowhere")])
@pytest.mark.parametrize("name", ["metrics.jsonl", "rollouts/step-000002.jsonl", "config.json", "episodes.jsonl"])
def test_a_folder_or_a_broken_link_in_place_of_a_file_ends_in_a_traceback(tmp_path, capsys, name, make):
    folder = a_run(tmp_path / "run", {1: [rollout()]})
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    (run,) = embedded(write_report(folder))["runs"]
    assert len(run["rollouts"]) == 1
    assert f"damaged data: {folder / name}\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--rollouts", "-1"], "--rollouts -1: give"),
        (["--rollouts", "x"], "invalid int"),
        (["--out", ""], "cannot be wr"),
    ],
)
def test_a_wrong_option_ends_in_a_traceback(tmp_path, capsys, argv, said):
    folder = a_run(tmp_path / "run", {1: [rollout()]})
    with pytest.raises(SystemExit) as stop:
        report.main([str(folder), *argv])
    told = capsys.readouterr().err
    assert stop.value.code == 2 and said in told and told.count("\n") == 1
    report.main([str(folder), "--rollouts", "0"])
    (run,) = embedded(folder / "report.html")["runs"]
    assert not run["rollouts"] and run["total"] == 1


def test_several_runs_stand_in_one_page(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a_run(tmp_path / "a", {1: [rollout()]}), a_run(tmp_path / "b", {1: [rollout()], 2: [rollout()]})
    report.main(["a", "b"])
    assert capsys.readouterr().out == "report.html\n"
    runs = embedded(tmp_path / "report.html")["runs"]
    assert [(run["name"], len(run["columns"]["step"])) for run in runs] == [("a", 1), ("b", 2)]


def test_runs_of_one_name_are_told_apart(tmp_path):
    folders = [a_run(tmp_path / name / "out", {1: [rollout()]}) for name in "ab"]
    report.main([*map(str, folders), "--out", str(tmp_path / "page.html")])
    assert [run["name"] for run in embedded(tmp_path / "page.html")["runs"]] == ["a/out", "b/out"]


def test_folder_of_no_run_is_refused_in_one_line(tmp_path, capsys):
    with pytest.raises(UserError, match="name a run's folder"):
        write_report(tmp_path)
    with pytest.raises(SystemExit) as stop:
        report.main([str(tmp_path)])
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    assert not list(tmp_path.iterdir())
    (tmp_path / "metrics.jsonl").write_bytes(json.dumps(step(1)).encode("utf-16"))
    with pytest.raises(UserError, match="metrics.jsonl, line 1"):
        write_report(tmp_path)


# ---- hostile data

CANARY = "document.documentElement.setAttribute('data-canary','sung')"
HOSTILE = [
    f"</script><script>{CANARY}</script>",
    f'<img src=x onerror="{CANARY}">',
    f"<svg/onload={CANARY}>",
    "<!--<script>",
    "]]>--></style></title></textarea>",
    "\u2028\u2029\x00\x1b\r\n\ufffe\ud800",
    f"javascript:{CANARY}",
    f"' onmouseover=\"{CANARY}\" x='",
    "DATA-HERE STYLE-HASH SCRIPT-HASH",
    "__proto__",
]


def hostile(seed, depth=0):
    """A value of JSON's with hostile text in all its places."""
    rng = random.Random(seed)
    text = "".join(rng.choices(HOSTILE, k=rng.randint(1, 3)))
    if depth == 2 or rng.random() < 0.5:
        return text
    inner = [hostile(rng.random(), depth + 1) for _ in range(2)]
    return inner if rng.random() < 0.5 else {text: inner[0], "x": inner[1]}


def hostile_rollout(group, text) -> dict:
    made = rollout(group, id=text, question=text, answers=[text, text], category=text, status=text, answer=text)
    for turn in made["turns"]:
        turn |= {"text": text, "query": text, "action": text}
    made["turns"][1]["observation"] |= {"titles": [text] * 2, "urls": [text, "javascript:" + text], "text": text}
    made["turns"][1]["observation"] |= {"thumbnails": [text, text], "error": text, "source": text}
    made["turns"][2]["pieces"] = [[text, 1, 0.5], [text, 0, None]]
    return made | {"image": text, "reward_parts": {text: 1.0}}


def test_no_markup_of_the_data_is_in_the_page(tmp_path):
    rollouts = [hostile_rollout(n, text) for n, text in enumerate(HOSTILE)]
    rollouts += [rollout(n, extra=hostile(n), id=str(hostile(-n))) for n in range(100, 400)]
    lines = [step(1), {"step": 1, "eval": {text: {"n": 1, "accuracy": 1.0} for text in HOSTILE}}]
    folder = a_run(tmp_path / HOSTILE[0].replace("/", "-"), {1: rollouts}, lines)
    (folder / "config.json").write_text(json.dumps({"recipe": HOSTILE[0]}))
    page = write_report(folder)
    own = report.PAGE.read_text(encoding="utf-8")
    raw = page.read_text(encoding="utf-8")
    assert raw.count("<") == own.count("<") and "\u2028" not in raw and "\u2029" not in raw
    kept = embedded(page)["runs"][0]["rollouts"]
    rollouts = json.loads(
        json.dumps(rollouts, ensure_ascii=False).replace("\ud800", "?")
    )  # a lone surrogate, which UTF-8 does not have
    assert [{key: found[key] for key in line} for found, line in zip(kept, rollouts, strict=True)] == rollouts


def test_page_makes_no_markup_of_text_and_asks_nobody():
    page = report.PAGE.read_text(encoding="utf-8")
    for way in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "Function(",
        "fetch(",
        " src=",
    ):
        assert way not in page, way
    assert "default-src 'none'" in page and "unsafe" not in page
    assert set(re.findall(r"https?://[\w.]+", page)) == {"http://www.w3.org"}, "but for SVG's name"


# ---- in a browser


def dom(tmp_path, page, fragment="") -> str:
    if BROWSER is None:
        pytest.skip("chromium: none on this machine")
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000", "--disable-extensions"]
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    line = [BROWSER, *flags, profile, "--dump-dom", page.as_uri() + (fragment and f"#{fragment}")]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-500:]
    return done.stdout.split('<script type="application/json"')[0]  # what is shown, without the data


@pytest.mark.slow
def test_browser_draws_filters_and_opens_what_the_address_says(tmp_path):
    wrong = rollout(1, 0, answer="Douro", reward=0.1, reward_parts={"accuracy": 0.0}, category="old")
    folder = a_run(tmp_path / "run", {1: [rollout(), wrong], 2: [rollout(0, s) for s in range(60)]})
    shown = dom(tmp_path, write_report(folder))
    assert (
        "<title>run</title>" in shown and shown.count("<svg") >= 5 and "62 rollouts in 3 groups, page 1 of 1" in shown
    )
    assert ">.750<" in shown and shown.count('class="row"') == 3 and "One rollout of step 2" in shown
    shown = dom(tmp_path, folder / "report.html", "outcome=wrong&from=0&text=doUro&at=0.1.1.0")
    assert "1 rollouts, page 1 of 1" in shown and "picture not kept" in shown and "expected: " in shown
    assert re.search(r'class="p4" title="p = 0.004">[^<]* so<', shown) and 'class="p0" title="p = 0.99"' in shown
    assert "A title" in shown and 'href="https://example.org/page"' in shown
    shown = dom(tmp_path, folder / "report.html", "at=0.2.0.7&beside=1&view=text")
    assert "The group of 60" in shown and shown.count("A title") == 62, "in the first view, the rollout, the columns"
    assert re.search(r"sample 59: <span[^>]*>✓</span> Tagus", shown)


def test_one_step_an_exact_zero_or_a_filter_without_a_hit_shows_nothing(tmp_path):
    page = write_report(a_run(tmp_path / "run", {1: [rollout()]}, [step(1, logp_gap=0.0)]))
    shown = dom(tmp_path, page, "step=99")
    gap = shown.split('aria-label="Log-probability gap')[1].split("</svg>")[0]
    assert re.search(r'<circle class="dot c0 [^>]*cy="120"', gap) and ">0</text>" in gap, "at the axis' floor"
    assert shown.count('<circle class="dot') >= 4, "reward, accuracy, searches"
    assert "No rollout of step 99 is in this page. It holds step 1 alone." in shown


def test_clicks_and_filters_are_kept_in_the_address_and_back_jumps(tmp_path, monkeypatch):
    """A page whose own script ends with a reader: filters, opens a rollout, another of its group, and closes it."""
    reader = """start();
    const noted = document.documentElement.dataset;
    const note = () => { noted.said = `${noted.said || ""} ${location.hash}`; };
    const wait = (ms) => new Promise((then) => setTimeout(then, ms));
    (async () => {
      const field = form.elements.outcome;
      field.value = "wrong"; field.dispatchEvent(new Event("change")); await wait(400); note();
      document.querySelector(".row").open = true; await wait(100);
      document.querySelectorAll(".sample")[1].scrollIntoView(); noted.from = scrollY;
      document.querySelectorAll(".sample")[1].click(); await wait(100); note();
      document.querySelectorAll(".right-pane tr.open")[0].click(); await wait(100); note();
      scrollTo(0, 0); byId("back").click(); await wait(100); note();
      noted.to = scrollY;
    })();"""
    monkeypatch.setattr(report, "PAGE", tmp_path / "page.html")
    shown = report.Path(report.__file__).with_name("page.html").read_text(encoding="utf-8")
    report.PAGE.write_text(shown.replace("\nstart();\n", f"\n{reader}\n"), encoding="utf-8")
    wrong = rollout(0, 1, reward_parts={"accuracy": 0.0})
    page = write_report(a_run(tmp_path / "run", {1: [rollout(), wrong]}))
    shown = dom(tmp_path, page)
    said, began, ended = (re.search(f'data-{name}="(.*?)"', shown)[1] for name in ("said", "from", "to"))
    chosen = "#outcome=wrong&amp;at=0.1.0."
    assert said.split() == ["#outcome=wrong", chosen + "1", chosen + "0", "#outcome=wrong"]
    assert began == ended != "0"


def test_browser_runs_nothing_that_the_data_brings(tmp_path):
    """Every hostile text is opened in every view; a server on this machine counts requests."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        call = f"<img src=http://127.0.0.1:{server.server_port}/asked>"
        control = tmp_path / "control.html"
        control.write_text(f'<html><body>{call}<img src=x onerror="{CANARY}"></body></html>')
        assert "data-canary" in dom(tmp_path, control).split(">")[0] and asked, "this browser can be tempted"
        asked.clear()
        text = call + "".join(HOSTILE)
        lines = [step(1), {"step": 1, "eval": {text: {"n": 1, "accuracy": 1.0}}}]
        folder = a_run(
            tmp_path / "run", {1: [hostile_rollout(0, text), hostile_rollout(0, text) | {"sample": 1}]}, lines
        )
        page = write_report(folder)
        for view in ("text", "tokens"):
            shown = dom(tmp_path, page, f"at=0.1.0.0&beside=1&view={view}")
            assert "The group of 2" in shown and "&lt;img src=http" in shown
            assert "data-canary" not in shown.split(">")[1] and 'href="javascript' not in shown
        server.shutdown()
    assert not asked
