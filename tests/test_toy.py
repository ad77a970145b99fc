"""The toy world, its tokenizer and its warm start."""

import json
import re

import numpy as np
import pytest
import torch
from conftest import MINIATURE

from mmsr import toy, toy_base
from mmsr.chat import PROMPTS, Chat
from mmsr.episode import UserError
from mmsr.model import load
from mmsr.tools import search_tools
from mmsr.vision import load_image


@pytest.fixture(scope="module")
def tokenizer():
    return toy_base.build_tokenizer()


@pytest.fixture(scope="module")
def chat(tokenizer, tmp_path_factory, world):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(folder / "tokenizer.json"))
    return Chat(folder, PROMPTS / "toy", search_tools(world.web, 1, 0))


@pytest.fixture
def fake_warm_start(monkeypatch):
    """A warm start that takes no time; returns the list of its calls."""
    calls = []

    def made(world, recipe, folder):
        calls.append((world.seed, recipe))
        folder.mkdir()
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(toy_base, "_warm_start", made)
    return calls


# ---- concepts -------------------------------------------------------------------------------------------------------


def distances(a, b):
    return (a[:, None] != b[None]).sum(-1)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_emblem_is_nearly_a_familiar_one(seed):
    world = toy.World(seed)
    emblems = {c: np.stack([concept.emblem for concept in world.of(c)]) for c in toy.CATEGORIES}
    assert {c: len(e) for c, e in emblems.items()} == {"familiar": 40, "unfamiliar": 300, "held_out": 300}
    assert np.array_equal(emblems["familiar"], world.familiar)
    others = np.concatenate([emblems["unfamiliar"], emblems["held_out"]])
    assert distances(others, world.familiar).min() >= 3
    assert len(np.unique(np.concatenate([others, world.familiar]), axis=0)) == 640
    novel = toy.draw_emblems(np.random.default_rng(seed), 500, unlike=world.familiar)
    assert len(novel) == 500 and distances(novel, world.familiar).min() >= 3


def test_neighbouring_colours_of_an_emblem_differ():
    drawn = toy.draw_emblems(np.random.default_rng(0), 800)
    assert (drawn < toy.RANGES).all() and (drawn >= 0).all() and len(np.unique(drawn, axis=0)) == 800
    main = drawn[:, toy.MAIN_COLOUR]
    assert (main != drawn[:, toy.BACKGROUND]).all() and (main != drawn[:, toy.INNER_COLOUR]).all()
    assert (drawn[:, toy.BADGE_COLOUR] != drawn[:, toy.BACKGROUND]).all()


def test_names_and_towns_are_nobody_elses(world):
    for words in ([c.name for c in world.concepts], [c.town for c in world.concepts]):
        assert len(set(words)) == 640


def test_pictures_of_one_emblem_differ_less_than_those_of_two(world):
    rng = np.random.default_rng(0)
    a, b = (world.concepts[i].emblem for i in (0, 1))
    same = toy.render(np.stack([a] * 20), rng).astype(float)
    other = toy.render(np.stack([b] * 20), rng).astype(float)
    assert same.shape == (20, toy.SIZE, toy.SIZE, 3) and len({picture.tobytes() for picture in same}) == 20
    assert abs(same.mean(0) - other.mean(0)).mean() > 3 * abs(same[:10].mean(0) - same[10:].mean(0)).mean()


def test_every_attribute_shows(world):
    """An attribute that is painted over would make two concepts look alike."""
    base = np.array([0, 0, 1, 1, 2, 0, 1, 0])
    for attribute in range(8):
        changed = base.copy()
        changed[attribute] = (
            3 if attribute in (toy.BACKGROUND, toy.MAIN_COLOUR, toy.INNER_COLOUR, toy.BADGE_COLOUR) else 2
        )
        a, b = (toy.render(np.stack([e] * 40), np.random.default_rng(1)).astype(float) for e in (base, changed))
        assert abs(a - b).mean(0).max() > 30, attribute


# ---- world and web --------------------------------------------------------------------------------------------------


def facts(world):
    return [(c.emblem.tolist(), c.name, c.town, c.category) for c in world.concepts]


def test_world_is_a_function_of_its_seed():
    a, b, other = toy.World(3), toy.World(3), toy.World(4)
    assert facts(a) == facts(b) != facts(other)
    late = b.questions("held_out", 5, "eval")  # in another order: nothing hangs on what was asked before
    assert a.train == b.train != other.train
    assert a.questions("held_out", 5, "eval") == late != a.questions("held_out", 5, "other")
    assert [a.web.image_search(e.image) for e in late] == [b.web.image_search(e.image) for e in late]


def test_training_questions_are_half_familiar_and_never_held_out(world):
    assert len(world.train) == 480 and len({e.id for e in world.train}) == 480
    kinds = [e.category for e in world.train]
    assert kinds.count("familiar") == kinds.count("unfamiliar") == 240
    assert {q: sum(e.question == q for e in world.train) for q in toy.QUESTIONS} == dict.fromkeys(toy.QUESTIONS, 240)
    held_out = {word for c in world.of("held_out") for word in (c.name, c.town)}
    assert not held_out & {answer for e in world.train for answer in e.answers}


def test_questions_know_their_answers_and_fit_the_model(world):
    by_answer = {(q, c.answer(i)): c for c in world.concepts for i, q in enumerate(toy.QUESTIONS)}
    for example in world.questions("unfamiliar", 30, "here"):
        concept = by_answer[example.question, example.answers[0]]
        assert concept.category == example.category == "unfamiliar"
        assert load_image(example.image, 56 * 56, 56 * 56).tokens == 4


def test_first_title_is_right_and_some_below_are_not(world):
    examples = world.questions("unfamiliar", 300, "titles")
    wrong = 0
    for example in examples:
        seen = world.web.image_search(example.image)
        titles = [hit.title for hit in seen.hits]
        assert seen.ok and seen.source == "toy" and len(titles) == toy.RESULTS
        name, _, town = titles[0].split()
        assert example.answers[0] == (name, town)[toy.QUESTIONS.index(example.question)]
        wrong += sum(title.split()[0] != name for title in titles[1:])
        assert world.web.image_search(example.image) == seen, "a search gives the same twice"
    assert abs(wrong / (2 * len(examples)) - toy.DISTRACTION) < 0.06


def test_web_knows_pictures_by_their_bytes_and_honestly_finds_no_others(world):
    example = world.questions("familiar", 1, "bytes")[0]
    concept = next(c for c in world.of("familiar") if example.answers[0] in (c.name, c.town))
    fresh = toy.png(toy.render(concept.emblem[None], np.random.default_rng(99))[0])
    for unknown in (fresh, example.image + b"\0", b""):
        seen = world.web.image_search(unknown)
        assert seen.ok and not seen.hits and seen.error is None
    assert world.web.image_search(bytes(example.image)).hits


def test_text_search_finds_names_and_towns_and_nothing_else(world):
    concept = world.concepts[77]
    for query in (concept.name, f"{concept.town} town", f"{concept.name} {concept.town}"):
        titles = [hit.title for hit in world.web.text_search(query).hits]
        assert f"{concept.name} of {concept.town}" in titles
    assert not world.web.text_search("").hits and not world.web.text_search("nobody's town").hits


# ---- tokenizer ------------------------------------------------------------------------------------------------------


def test_names_are_three_tokens_and_towns_two(world, tokenizer):
    for concept in world.concepts:
        for word, n in ((concept.name, 3), (concept.town, 2)):
            assert len(tokenizer.encode(word).ids) == len(tokenizer.encode(f" {word}").ids) == n, word


def test_every_word_of_the_traces_is_one_token(tokenizer):
    templates = [path.read_text() for path in (PROMPTS / "toy").glob("*.txt")]
    said = [toy.LOOK_IT_UP, toy_base.recalled("", ""), toy_base.copied(""), *toy.QUESTIONS, *toy.TITLES, "user assistant"]
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


def test_traces_recall_first_or_search_and_copy(world, chat):
    """The direct reason must begin with the name: an opaque one makes every run drift to always-search."""
    batch = toy_base.Traces(world, chat, 1).batch(400)
    known = {word: c for c in world.of("familiar") for word in (c.name, c.town)}
    searches = 0
    for episode in batch:
        question = toy.QUESTIONS.index(episode.example.question)
        text = chat.decode(episode.input_ids)
        prompt, *spoken = re.split(r"<\|im_start\|>assistant\n", text)
        spoken = [turn.split("<|im_end|>")[0] for turn in spoken]
        assert all(chat.well_formed(turn) for turn in spoken)
        answer = chat.parse(spoken[-1]).query
        if len(spoken) == 2:
            searches += 1
            assert spoken[0] == toy.LOOK_IT_UP and "no search" not in prompt
            first = re.search(r"<information> (\w+) \w+ (\w+) ;", text).groups()
            assert answer == first[question]
        else:
            name = spoken[0].split()[1]
            assert spoken[0] == toy_base.recalled(name, answer) and (question == 1 or answer == name)
            if episode.example.category == "familiar":
                assert known[answer].name == name
    assert 0.4 < searches / 400 < 0.6
    kinds = [episode.example.category for episode in batch]
    assert kinds.count("familiar") == kinds.count("novel") == 200
    novel = {
        chat.parse(chat.decode(e.input_ids).split("assistant\n")[-1]).query
        for e in batch
        if e.example.category == "novel"
    }
    assert len(novel) > 150, "a one-off emblem has a name of its own"


def test_traces_are_a_function_of_the_seed(world, chat):
    a, b, c = (toy_base.Traces(world, chat, seed).batch(8) for seed in (1, 1, 2))
    assert [e.input_ids for e in a] == [e.input_ids for e in b] != [e.input_ids for e in c]
    assert all(torch.equal(x.images[0][1].patches, y.images[0][1].patches) for x, y in zip(a, b))


# ---- warm start -----------------------------------------------------------------------------------------------------


def test_warm_start_makes_a_folder_that_transformers_opens(miniature):
    from transformers import PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration

    twin, loading = Qwen2_5_VLForConditionalGeneration.from_pretrained(miniature, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]
    assert sum(p.numel() for p in twin.parameters()) == sum(p.numel() for p in load(miniature).parameters())
    ids = PreTrainedTokenizerFast(tokenizer_file=str(miniature / "tokenizer.json"))("<|im_start|>user")["input_ids"]
    config = json.loads((miniature / "config.json").read_text())
    assert len(ids) == 2 and max(ids) < config["vocab_size"] and config["model_type"] == "qwen2_5_vl"


def test_warm_start_teaches_the_markup(miniature, world):
    """A few seconds are enough to speak; without this the tests of training would train on nothing."""
    from mmsr.engine import Engine
    from mmsr.rollout import Limits, Rollout
    from mmsr.tools import Toolbox

    tools = search_tools(world.web, 1, 0)
    chat, model = Chat(miniature, PROMPTS / "toy", tools), load(miniature)
    engine = Engine(model, chat.stop_id, chat.banned(model.config.vocab_size), slots=64, max_tokens=128, turn_tokens=32)
    rollout = Rollout(engine, chat, Toolbox(tools, True), Limits(2, 56 * 56, 56 * 56))
    episodes = rollout(world.questions("familiar", 16, "markup"), 2)
    assert sum(e.status == "answered" for e in episodes) > 16
    assert 4 < sum(e.searches() for e in episodes) < 30


def test_warm_start_is_made_once(miniature, miniature_cache, world, monkeypatch, fake_warm_start):
    monkeypatch.setenv("MMSR_CACHE", str(miniature_cache))
    before = {file: file.stat().st_mtime_ns for file in miniature.iterdir()}
    assert toy_base.base_model(toy.World(0), MINIATURE) == miniature
    assert not fake_warm_start and before == {file: file.stat().st_mtime_ns for file in miniature.iterdir()}
    assert list(miniature_cache.iterdir()) == [miniature]


def test_another_recipe_or_world_is_another_folder(tmp_path, monkeypatch, fake_warm_start, world):
    monkeypatch.setenv("MMSR_CACHE", str(tmp_path / "one"))
    folders = [
        toy_base.base_model(world, MINIATURE),
        toy_base.base_model(world, toy_base.WarmStart(steps=61)),
        toy_base.base_model(toy.World(1), MINIATURE),
        toy_base.base_model(world, MINIATURE),
    ]
    assert folders[0] == folders[3] and len(set(folders)) == 3 == len(fake_warm_start)
    assert all(folder.parent == tmp_path / "one" for folder in folders)
    monkeypatch.setenv("MMSR_CACHE", str(tmp_path / "two"))
    assert toy_base.base_model(world, MINIATURE).parent == tmp_path / "two"


def test_cache_is_in_the_home_folder_unless_told_otherwise(tmp_path, monkeypatch, fake_warm_start, world):
    monkeypatch.delenv("MMSR_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert toy_base.base_model(world).parent == tmp_path / ".cache" / "mmsr"


def test_missed_gate_is_the_users_to_know_and_leaves_nothing(tmp_path, monkeypatch, world):
    measured = []
    monkeypatch.setenv("MMSR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(toy_base, "_gate", lambda *given: measured.append(given) or (0.96, 0.5))
    with pytest.raises(UserError) as error:
        toy_base.base_model(world, toy_base.WarmStart(steps=2, batch=4, extra=1, most=4))
    assert len(measured) == 3, "at 2, 3 and 4 steps"
    assert "0.500" in str(error.value) and "--seed" in str(error.value) and "\n" not in str(error.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_gate_is_passed_by_both_numbers(tmp_path, monkeypatch, world):
    monkeypatch.setenv("MMSR_CACHE", str(tmp_path / "cache"))
    found = [(0.96, 0.5), (0.5, 0.96), (0.95, 0.8)]
    monkeypatch.setattr(toy_base, "_gate", lambda *given: found.pop(0))
    folder = toy_base.base_model(world, toy_base.WarmStart(steps=1, batch=4, extra=1, most=9))
    assert not found and (folder / "model.safetensors").exists()


def test_interrupted_warm_start_leaves_nothing(tmp_path, monkeypatch, world):
    def interrupted(world, recipe, folder):
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

    def made(world, recipe, folder):
        folder.mkdir()
        (folder / "config.json").write_text("{}")

    def overtaken(world, recipe, folder):
        monkeypatch.setattr(toy_base, "_warm_start", made)
        toy_base.base_model(world, recipe)
        made(world, recipe, folder)

    monkeypatch.setattr(toy_base, "_warm_start", overtaken)
    folder = toy_base.base_model(world)
    assert [file.name for file in folder.iterdir()] == ["config.json"]
    assert list(folder.parent.iterdir()) == [folder]
