"""The toy world's base model: tokenizer, traces, warm start and its gate."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MINIATURE
from helpers import FAMILIES

from mmsr.chat import PROMPTS, Chat
from mmsr.engine import Engine
from mmsr.pretrained.load import load
from mmsr.rollout import Limits, Rollout, Script
from mmsr.system.errors import UserError
from mmsr.tools import IMAGE_SEARCH, TEXT_SEARCH, Toolbox, search_tools
from mmsr.toy import base as toy_base
from mmsr.toy import world as toy


@pytest.fixture(scope="module")
def tokenizer():
    return toy_base.build_tokenizer()


@pytest.fixture(scope="module")
def full():
    return toy.World(0, toy.FULL)


@pytest.fixture(scope="module")
def chat(tokenizer, tmp_path_factory, full):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(folder / "tokenizer.json"))
    return Chat(folder, PROMPTS / "toy", search_tools(full.web, 1, 1))


@pytest.fixture
def fake_warm_start(monkeypatch):
    """A warm start that takes no time; returns the list of its calls."""
    calls = []

    def made(world, recipe, folder, family):
        calls.append((world.seed, world.settings, recipe))
        folder.mkdir()
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(toy_base, "_warm_start", made)
    return calls


# ---- tokenizer ------------------------------------------------------------------------------------------------------


def test_names_are_three_tokens_and_towns_two(world, tokenizer):
    for concept in world.concepts:
        for word, n in ((concept.name, 3), (concept.town, 2)):
            assert len(tokenizer.encode(word).ids) == len(tokenizer.encode(f" {word}").ids) == n, word


def test_every_word_of_the_traces_is_one_token(tokenizer):
    templates = [path.read_text() for path in (PROMPTS / "toy").glob("*.txt")]
    said = [
        toy.LOOK_IT_UP,
        toy.look_up(""),
        toy_base.copied(""),
        *toy.QUESTIONS,
        *toy.TITLES,
        *toy.PAGES,
        "user assistant",
    ]
    words = {word for text in templates + said for word in text.split() if "{" not in word}
    assert len(words) > 30
    for word in words:
        assert len(tokenizer.encode(word).ids) == len(tokenizer.encode(f" {word}").ids) == 1, word
    assert len(tokenizer.encode("user\n").ids) == 2


def test_any_text_round_trips(chat):
    texts = [
        "",
        " ",
        "  two  blanks \n\n\ttab \r\n",
        "Ünïcödé 漢字 🙂 \u200b",
        "<|im_end|><|image_pad|>",
        "a" * 99,
        "<reason>x</reason>",
    ]
    rng = np.random.default_rng(0)
    texts += ["".join(map(chr, rng.integers(1, 0xD7FF, 40))) for _ in range(50)]
    for text in texts:
        assert chat.decode(chat.assistant(text)) == text + "<|im_end|>"


def test_control_tokens_stand_behind_the_vocabulary_in_qwens_order(tokenizer):
    ids = [tokenizer.token_to_id(name) for name in toy_base.SPECIAL]
    assert ids == list(range(ids[0], tokenizer.get_vocab_size()))


def test_tokenizer_is_the_same_every_time(tokenizer):
    assert toy_base.build_tokenizer().to_str() == tokenizer.to_str()


# ---- traces ---------------------------------------------------------------------------------------------------------


def test_traces_train_exactly_the_assistants_words(world, chat):
    opening = chat.assistant("assistant\n")[:-1]
    start, stop = chat.added["<|im_start|>"], chat.stop_id
    for episode in toy_base.Traces(world, chat, 1).batch(60):
        ids, speaking, mask = episode.input_ids, False, []
        for at, token in enumerate(ids):
            mask.append(int(speaking))
            if speaking and token == stop:
                speaking = False
            elif ids[at - len(opening) : at + 1] == [start, *opening]:
                speaking = True
        assert episode.loss_mask == mask and not speaking
        assert len(episode.logps) == len(ids) and episode.advantage == 1
        assert sum(mask[: episode.prompt_length]) == 0 and mask[episode.prompt_length] == 1
        ((offset, image),) = episode.images
        pads = [at for at, token in enumerate(ids) if token == chat.added["<|image_pad|>"]]
        assert pads == list(range(offset, offset + image.tokens))


def spoken(chat, episode) -> tuple[list[str], list[str]]:
    """What the model says and what it is told, turn by turn; the prompt is told first."""
    text = chat.decode(episode.input_ids)
    told, *turns = re.split(r"<\|im_start\|>assistant\n", text)
    said = [turn.split("<|im_end|>")[0] for turn in turns]
    return said, [told, *(turn.split("<|im_start|>user\n")[1] for turn in turns[:-1])]


def test_traces_recall_first_or_search_and_copy(world, chat):
    """The direct reason must begin with the name: an opaque one makes every run drift to always-search."""
    batch = toy_base.Traces(world, chat, 1).batch(400)
    known = {word: c for c in world.of("familiar") for word in (c.name, c.town)}
    searches = 0
    for episode in batch:
        question = toy.QUESTIONS.index(episode.example.question)
        said, told = spoken(chat, episode)
        assert all(chat.well_formed(turn) for turn in said)
        answer = chat.parse(said[-1]).query
        if len(said) == 2:
            searches += 1
            assert said[0] == toy.LOOK_IT_UP and "no search" not in told[0]
            first = re.search(r"<information> (\w+) \w+ (\w+) ;", told[1]).groups()
            assert answer == first[question] and said[1] == toy_base.copied(answer)
        else:
            words = said[0].split()
            assert words[1] == answer if question == toy.NAME else words[1:4:2] == [words[1], answer]
            if episode.example.category == "familiar":
                assert known[answer].name == words[1]
    assert 0.36 < searches / 400 < 0.52
    kinds = [episode.example.category for episode in batch]
    assert kinds.count("familiar") == kinds.count("novel") == 200
    novel = {chat.parse(spoken(chat, e)[0][-1]).query for e in batch if e.example.category == "novel"}
    assert len(novel) > 150, "a one-off emblem has a name of its own"


def test_full_traces_are_the_four_shapes_and_each_decision_stands_where_a_recall_would(full, chat):
    shapes = {}
    for episode in toy_base.Traces(full, chat, 1).batch(500):
        question = toy.QUESTIONS.index(episode.example.question)
        said, told = spoken(chat, episode)
        assert all(chat.well_formed(turn) for turn in said)
        *searches, answer = [chat.parse(turn) for turn in said]
        shape = tuple(search.name for search in searches)
        shapes[question, shape] = shapes.get((question, shape), 0) + 1
        assert not (shape and "no search" in told[0])
        name, town, last = None, None, said[-1]
        for search, turn, result in zip(searches, said, told[1:]):
            if search.name == IMAGE_SEARCH:
                assert turn == toy.LOOK_IT_UP
                name = re.match(r"<information> (\w+) ", result)[1]
            else:
                name = name or turn.split()[1]
                assert turn == toy.look_up(name)
                town = re.match(rf"<information> {name} \w+ (\w+) ;", result)[1]
        if town or question == toy.NAME and name:
            assert last == toy_base.copied(town or name) and answer.query == (town or name)
        else:
            name = name or last.split()[1]
            recall = name if question == toy.NAME else f"{name} , {answer.query}"
            assert last == f"<reason> {recall} . </reason> <answer> {answer.query} </answer>"
    assert set(shapes) == {
        *((toy.NAME, shape) for shape in [(), (IMAGE_SEARCH,)]),
        *((toy.TOWN, shape) for shape in [(), (IMAGE_SEARCH,), (TEXT_SEARCH,), (IMAGE_SEARCH, TEXT_SEARCH)]),
    }
    assert min(shapes.values()) > 30


@pytest.mark.slow
def test_full_traces_tell_what_is_to_be_known_and_make_up_the_rest_each_time(full, chat):
    """A town that the model is not to know would be learnt if it were the same in two traces."""
    named, towns = {}, {"known": set(), "named": set()}
    for episode in toy_base.Traces(full, chat, 1).batch(1200):
        pool, (said, _) = episode.example.category, spoken(chat, episode)
        reason = said[-1].split("</reason>")[0].split()[1:-1]
        if len(said) == 1:
            named.setdefault(pool, set()).add(reason[0])
        if pool in towns and len(said) == 1 and len(reason) == 3:
            towns[pool].add((reason[0], reason[2]))
    assert named["known"] <= {c.name for c in full.of("known")} and named["named"] <= {c.name for c in full.of("named")}
    assert min(len(named["known"]), len(named["named"])) > 20 and len(named["novel"]) > 200
    assert towns["known"] <= {(c.name, c.town) for c in full.of("known")}
    assert len(towns["named"]) > 1.4 * len({name for name, _ in towns["named"]})


@pytest.mark.slow
def test_traces_show_concepts_in_proportion_to_their_exposure(chat):
    world = toy.World(0, toy.graded(toy.FULL, (2400, 150, 0)))
    batch = toy_base.Traces(world, chat, 1).batch(1200)
    shown = {p.name: sum(e.example.category == p.name for e in batch) for p in world.settings.pools}
    assert shown["exposure_0"] == shown["unfamiliar"] == shown["held_out"] == 0
    each = 600 / (24 * 700 + 24 * 500 + 18 * 2400 + 18 * 150)
    for pool in world.settings.pools:
        expected = pool.size * pool.exposure * each if pool.facts else 0
        assert abs(shown[pool.name] - expected) <= 4 * expected**0.5, pool.name


def test_a_naive_reader_copies_from_every_rank(chat):
    world = toy.World(0, dataclasses.replace(toy.FULL, reader=(0.4, 0.3, 0.3)))
    copies, total = 0, 0
    for episode in toy_base.Traces(world, chat, 1).batch(600):
        said, told = spoken(chat, episode)
        if len(said) == 2 and episode.example.question == toy.QUESTIONS[toy.NAME]:
            titles = [title.split()[0] for title in re.findall(r"\w+ \w+ ;", told[1])]
            total += 1
            copies += chat.parse(said[1]).query == titles[0]
            assert chat.parse(said[1]).query in titles
    assert abs(copies / total - (1 - 0.6 * toy.DISTRACTION)) < 0.13


def test_traces_hold_the_thumbnails_that_they_show(chat):
    world = toy.World(0, dataclasses.replace(toy.FULL, thumbnails=True))
    pad = chat.added["<|image_pad|>"]
    seen = 0
    for episode in toy_base.Traces(world, chat, 1).batch(20):
        by_image = toy.LOOK_IT_UP in spoken(chat, episode)[0]
        seen += by_image
        assert len(episode.images) == 1 + 3 * by_image
        places = [at for offset, image in episode.images for at in range(offset, offset + image.tokens)]
        assert places == [at for at, token in enumerate(episode.input_ids) if token == pad]
    assert seen


def test_traces_are_a_function_of_the_seed(world, chat):
    a, b, c = (toy_base.Traces(world, chat, seed).batch(8) for seed in (1, 1, 2))
    assert [e.input_ids for e in a] == [e.input_ids for e in b] != [e.input_ids for e in c]
    assert all(torch.equal(x.images[0][1].patches, y.images[0][1].patches) for x, y in zip(a, b))


# ---- warm start -----------------------------------------------------------------------------------------------------


@pytest.fixture(params=FAMILIES)
def of_family(request):
    """The folder of each family's miniature, and what config.json calls the family."""
    name = "miniature" if request.param == "qwen2_5" else f"miniature_{request.param}"
    return request.getfixturevalue(name), f"{request.param}_vl"


def test_warm_start_makes_a_folder_that_transformers_opens(of_family):
    from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast

    miniature, model_type = of_family
    twin, loading = AutoModelForImageTextToText.from_pretrained(miniature, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]
    assert sum(p.numel() for p in twin.parameters()) == sum(p.numel() for p in load(miniature).parameters())
    ids = PreTrainedTokenizerFast(tokenizer_file=str(miniature / "tokenizer.json"))("<|im_start|>user")["input_ids"]
    config = json.loads((miniature / "config.json").read_text())
    assert (
        len(ids) == 2
        and max(ids) < config.get("text_config", config)["vocab_size"]
        and config["model_type"] == model_type
    )


def test_warm_start_teaches_the_markup(of_family, world):
    """A few seconds are enough to speak; without this the tests of training would train on nothing."""
    miniature, _ = of_family
    tools = search_tools(world.web, 1, 0)
    chat, model = Chat(miniature, PROMPTS / "toy", tools), load(miniature)
    engine = Engine(
        model, chat.stop_id, chat.suppressed_tokens(model.config.vocab_size), slots=64, max_tokens=128, turn_tokens=32
    )
    limits = Limits(2, toy.MIN_PIXELS, toy.MAX_PIXELS, processor=model.config.vision.processor)
    rollout = Rollout(engine, chat, Toolbox(tools, True), limits)
    episodes = rollout(world.questions("familiar", 16, "markup"), 2)
    assert all(image.tokens == 4 for episode in episodes for _, image in episode.images)
    assert sum(e.status == "answered" for e in episodes) > 16
    assert 4 < sum(e.searches() for e in episodes) < 30


def test_warm_start_is_made_once(miniature, miniature_cache, world, monkeypatch, fake_warm_start):
    monkeypatch.setenv("MMSR_CACHE", str(miniature_cache))
    before = {file: file.stat().st_mtime_ns for file in miniature.iterdir()}
    assert toy_base.base_model(toy.World(0), MINIATURE) == miniature
    assert not fake_warm_start and before == {file: file.stat().st_mtime_ns for file in miniature.iterdir()}
    assert all(folder.name.startswith("toy-base-") for folder in miniature_cache.iterdir())


def test_worlds_that_differ_in_nothing_the_warm_start_sees_share_a_folder(tmp_path, monkeypatch, fake_warm_start):
    monkeypatch.setenv("MMSR_CACHE", str(tmp_path))

    def folder(**changes):
        return toy_base.base_model(toy.World(0, dataclasses.replace(toy.FULL, **changes)))

    first = folder()
    assert folder(wrong=0.3) == folder(categories=toy.FULL.categories[:1]) == first
    others = {folder(thumbnails=True), folder(reader=(0.4, 0.3, 0.3)), folder(two_hops=False)}
    assert len(others) == 3 and first not in others
    assert all(settings.wrong == 0 for _, settings, _ in fake_warm_start), "the gate is for copying, not for retrieval"


def test_a_comment_makes_the_base_model_anew(tmp_path, monkeypatch, fake_warm_start, world):
    source = shutil.copytree(Path(toy_base.__file__).parents[1], tmp_path / "mmsr", ignore=lambda *_: ["prompts"])
    monkeypatch.setattr(toy_base, "__file__", str(source / "toy" / "base.py"))
    monkeypatch.setenv("MMSR_CACHE", str(tmp_path / "cache"))

    def edit(name, old, new):
        text = (source / name).read_text()
        assert old in text
        (source / name).write_text(text.replace(old, new, 1))

    first = toy_base.base_model(world)
    edit("toy/world.py", "\n\n", "\n\n# why\n\n")
    edit("chat.py", '"""', '"""Other words. ')
    edit("vision.py", "class VisionTower(nn.Module):", "class VisionTower(\n    nn.Module\n):  # the tower")
    edit("report/html.py", "10_000", "9_000")  # not one that makes it
    edit("qwen3_vl.py", "floor()", "ceil()")  # one that makes a model of the other family
    assert toy_base.base_model(world) == first
    edit("toy/base.py", "DIRECT = 0.125", "DIRECT = 0.25")
    assert toy_base.base_model(world) != first


def test_steps_are_what_the_exposures_take(tmp_path, monkeypatch, fake_warm_start):
    monkeypatch.setenv("MMSR_CACHE", str(tmp_path))
    for settings in (toy.BASIC, toy.FULL, toy.graded(toy.FULL, (800, 0))):
        toy_base.base_model(toy.World(0, settings))
    assert [recipe.steps for _, _, recipe in fake_warm_start] == [900, 900, 900 + 18 * 800 / 32]


def test_another_recipe_world_or_family_is_another_folder(tmp_path, monkeypatch, fake_warm_start, world):
    monkeypatch.setenv("MMSR_CACHE", str(tmp_path / "one"))
    folders = [
        toy_base.base_model(world, MINIATURE),
        toy_base.base_model(world, toy_base.WarmStart(steps=61)),
        toy_base.base_model(toy.World(1), MINIATURE),
        toy_base.base_model(world, MINIATURE, "qwen3"),
        toy_base.base_model(world, MINIATURE),
    ]
    assert folders[0] == folders[4] and len(set(folders)) == 4 == len(fake_warm_start)
    assert all(folder.parent == tmp_path / "one" for folder in folders)
    monkeypatch.setenv("MMSR_CACHE", str(tmp_path / "two"))
    assert toy_base.base_model(world, MINIATURE).parent == tmp_path / "two"


def test_cache_is_in_the_home_folder_unless_told_otherwise(tmp_path, monkeypatch, fake_warm_start, world):
    monkeypatch.delenv("MMSR_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert toy_base.base_model(world).parent == tmp_path / ".cache" / "mmsr"


@pytest.mark.parametrize("short", ["copying", "names", "towns"])
def test_missed_gate_is_the_users_to_know_and_leaves_nothing(tmp_path, monkeypatch, world, short):
    measured = []
    reached = {"copying": 0.95, "names": 0.85, "towns": 0.85, short: 0.512}
    monkeypatch.setenv("MMSR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(toy_base, "_gate", lambda *given: measured.append(given) or reached)
    with pytest.raises(UserError) as error:
        toy_base.base_model(world, toy_base.WarmStart(steps=2, batch=4, extra=1, stretches=2))
    assert len(measured) == 3, "at 2, 3 and 4 steps"
    said = str(error.value)
    assert f"{short} 0.512" in said and "--seed" in said and "\n" not in said
    assert list((tmp_path / "cache").iterdir()) == []


def test_gate_is_passed_by_all_its_numbers(tmp_path, monkeypatch, world):
    monkeypatch.setenv("MMSR_CACHE", str(tmp_path / "cache"))
    found = [
        dict(copying=0.96, names=0.5, towns=0.9),
        dict(copying=0.5, names=0.96, towns=0.9),
        dict(copying=0.96, names=0.9, towns=0.5),
        dict(copying=0.95, names=0.85, towns=0.85),
    ]
    monkeypatch.setattr(toy_base, "_gate", lambda *given: found.pop(0))
    folder = toy_base.base_model(world, toy_base.WarmStart(steps=1, batch=4, extra=1))
    assert not found and (folder / "model.safetensors").exists()


def test_gate_measures_forced_searches_and_direct_recall_of_what_was_shown_enough(monkeypatch, chat, miniature):
    """By the questions and the openings that it gives to the rollout, which stands still here."""
    asked, full = [], toy.World(0, toy.graded(toy.FULL, (1000, 100)))

    class Still:
        def __init__(self, *given, direct):
            self.direct = direct

        def __call__(self, examples, size, seed, scripts):
            asked.append((examples, self.direct, [scripts(e, 0) for e in examples] if scripts else None))
            return []

    monkeypatch.setattr(toy_base, "Rollout", Still)
    monkeypatch.setattr(toy_base, "len", lambda episodes: 1, raising=False)
    model = load(miniature)
    suppressed = chat.suppressed_tokens(model.config.vocab_size)
    assert set(toy_base._gate(model, chat, full, suppressed)) == {"copying", "names", "towns"}
    pool = {word: c.pool for c in full.concepts for word in (c.name, c.town)}
    pools = [{pool[e.answers[0]] for e in examples} for examples, _, _ in asked]
    assert pools == [{"unfamiliar", "held_out"}, {"known", "named", "exposure_1000"}, {"known"}]
    questions = [{e.question for e in examples} for examples, _, _ in asked]
    assert questions == [set(toy.QUESTIONS), {toy.QUESTIONS[toy.NAME]}, {toy.QUESTIONS[toy.TOWN]}]
    assert [direct for _, direct, _ in asked] == [False, True, True]
    examples, _, scripts = asked[0]
    assert scripts == [Script(full.always_search(e)) for e in examples]
    assert {len(script.turns) for script in scripts} == {1, 2}
    few = tuple(dataclasses.replace(pool, exposure=min(pool.exposure, 300)) for pool in toy.FULL.pools)
    seldom_shown = toy.World(0, dataclasses.replace(toy.FULL, pools=few))
    assert set(toy_base._gate(model, chat, seldom_shown, suppressed)) == {"copying"}


def test_interrupted_warm_start_leaves_nothing(tmp_path, monkeypatch, world):
    def interrupted(world, recipe, folder, family):
        folder.mkdir()
        (folder / "tokenizer.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setenv("MMSR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(toy_base, "_warm_start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        toy_base.base_model(world)
    assert list((tmp_path / "cache").iterdir()) == []


def test_two_warm_starts_at_a_time_leave_one_sound_folder(tmp_path, monkeypatch, world):
    """The second one to finish must not be moved into the first one's folder."""
    monkeypatch.setenv("MMSR_CACHE", str(tmp_path / "cache"))

    def made(world, recipe, folder, family):
        folder.mkdir()
        (folder / "config.json").write_text("{}")

    def overtaken(world, recipe, folder, family):
        monkeypatch.setattr(toy_base, "_warm_start", made)
        toy_base.base_model(world, recipe)
        made(world, recipe, folder, family)

    monkeypatch.setattr(toy_base, "_warm_start", overtaken)
    folder = toy_base.base_model(world)
    assert [file.name for file in folder.iterdir()] == ["config.json"]
    assert list(folder.parent.iterdir()) == [folder]
