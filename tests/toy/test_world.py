"""The toy world: its concepts, its questions, its web, in both settings."""

import dataclasses

import numpy as np
import pytest

from mmsr.toy import world as toy
from mmsr.vision import load_image


@pytest.fixture(scope="module")
def full():
    return toy.World(0, toy.FULL)


def perfect(settings):
    return dataclasses.replace(settings, wrong=0.0)


# ---- concepts -------------------------------------------------------------------------------------------------------


def distances(a, b):
    return (a[:, None] != b[None]).sum(-1)


@pytest.mark.parametrize("settings", [toy.BASIC, toy.FULL], ids=["basic", "full"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_emblem_is_nearly_one_that_was_taught(seed, settings):
    world = toy.World(seed, settings)
    of_each = {pool.name: np.stack([concept.emblem for concept in world.of(pool.name)]) for pool in settings.pools}
    assert {name: len(emblems) for name, emblems in of_each.items()} == {p.name: p.size for p in settings.pools}
    assert np.array_equal(world.taught, np.concatenate([of_each[p.name] for p in settings.pools if p.facts]))
    others = np.concatenate([of_each[p.name] for p in settings.pools if not p.facts])
    assert distances(others, world.taught).min() >= 3
    everything = np.concatenate([others, world.taught])
    assert len(np.unique(everything, axis=0)) == len(everything), "pools share no emblem"
    novel = toy.draw_emblems(np.random.default_rng(seed), 500, unlike=world.taught)
    assert len(novel) == 500 and distances(novel, world.taught).min() >= 3


def test_neighbouring_colours_of_an_emblem_differ():
    drawn = toy.draw_emblems(np.random.default_rng(0), 800)
    assert (drawn < toy.RANGES).all() and (drawn >= 0).all() and len(np.unique(drawn, axis=0)) == 800
    main = drawn[:, toy.MAIN_COLOUR]
    assert (main != drawn[:, toy.BACKGROUND]).all() and (main != drawn[:, toy.INNER_COLOUR]).all()
    assert (drawn[:, toy.BADGE_COLOUR] != drawn[:, toy.BACKGROUND]).all()


def test_names_and_towns_are_nobody_elses(world, full):
    for concepts in (world.concepts, full.concepts):
        for words in ([c.name for c in concepts], [c.town for c in concepts]):
            assert len(set(words)) == len(concepts)


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


# ---- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [toy.BASIC, toy.FULL], ids=["basic", "full"])
def test_concepts_are_shown_often_enough_and_known_and_unknown_weigh_alike(settings):
    assert all(pool.exposure >= 450 for pool in settings.pools if pool.facts)
    assert sum(settings.mix.values()) == pytest.approx(1)
    of_pool = {pool.name: 0.0 for pool in settings.pools}
    for category in settings.categories:
        for name in category.pools:
            of_pool[name] += category.weight / len(category.pools)
    unknown = sum(weight for name, weight in of_pool.items() if not settings.facts(name))
    assert unknown == pytest.approx(0.5 if settings is toy.BASIC else 1 / 3)
    assert of_pool["held_out"] == of_pool["unfamiliar"]


def test_graded_concepts_are_asked_about_but_never_in_training():
    settings = toy.graded(toy.FULL, (500, 50, 0))
    world = toy.World(0, settings)
    assert [(p.name, p.size, p.facts) for p in settings.pools[-3:]] == [
        *(("exposure_500", 18, 1), ("exposure_50", 18, 1), ("exposure_0", 18, 0)),
    ]
    asked = world.questions("exposure_50", 12, "here")
    names = {concept.name for concept in world.of("exposure_50")}
    assert {e.question for e in asked} == {toy.QUESTIONS[toy.NAME]} and {e.answers[0] for e in asked} <= names
    assert settings.mix["exposure_50"] == 0
    graded = {word for p in settings.pools[-3:] for c in world.of(p.name) for word in (c.name, c.town)}
    assert not graded & {answer for e in world.train for answer in e.answers}


# ---- world ----------------------------------------------------------------------------------------------------------


def facts(world):
    return [(c.emblem.tolist(), c.name, c.town, c.pool) for c in world.concepts]


@pytest.mark.slow
@pytest.mark.parametrize("settings", [toy.BASIC, toy.FULL], ids=["basic", "full"])
def test_world_is_a_function_of_its_seed(settings):
    a, b, other = toy.World(3, settings), toy.World(3, settings), toy.World(4, settings)
    assert facts(a) == facts(b) != facts(other)
    late = b.questions("held_out", 5, "eval")  # in another order: nothing hangs on what was asked before
    assert a.train == b.train != other.train
    assert a.questions("held_out", 5, "eval") == late != a.questions("held_out", 5, "other")
    assert [a.web.image_search(e.image) for e in late] == [b.web.image_search(e.image) for e in late]
    assert [a.web.text_search(c.name) for c in a.concepts] == [b.web.text_search(c.name) for c in b.concepts]


def test_basic_training_questions_are_half_familiar(world):
    assert len(world.train) == 480 and len({e.id for e in world.train}) == 480
    kinds = [e.category for e in world.train]
    assert kinds.count("familiar") == kinds.count("unfamiliar") == 240
    assert {q: sum(e.question == q for e in world.train) for q in toy.QUESTIONS} == dict.fromkeys(toy.QUESTIONS, 240)


def test_full_training_questions_are_a_third_each_known_named_and_unfamiliar(full):
    assert len(full.train) == 480 and len({e.id for e in full.train}) == 480
    pool = {answer: c.pool for c in full.concepts for answer in (c.name, c.town)}
    pools = [pool[e.answers[0]] for e in full.train]
    assert pools.count("unfamiliar") == 160 and 130 < pools.count("known") < 190 and 130 < pools.count("named") < 190
    assert {q: sum(e.question == q for e in full.train) for q in toy.QUESTIONS} == dict.fromkeys(toy.QUESTIONS, 240)


def test_training_never_asks_about_what_is_held_out(world, full):
    for it in (world, full):
        held_out = {word for c in it.of("held_out") for word in (c.name, c.town)}
        assert not held_out & {answer for e in it.train for answer in e.answers}


def test_questions_know_their_answers_and_fit_the_model(full):
    for category in full.settings.categories:
        examples = full.questions(category.name, 30, "here")
        by_answer = {(q, c.answer(i)): c for c in full.concepts for i, q in enumerate(toy.QUESTIONS)}
        assert {e.question for e in examples} == {toy.QUESTIONS[i] for i in category.questions}
        for example in examples:
            concept = by_answer[example.question, example.answers[0]]
            assert concept.pool in category.pools and example.category == category.name
            assert load_image(example.image, 56 * 56, 56 * 56).tokens == 4


# ---- web ------------------------------------------------------------------------------------------------------------


def test_basic_titles_tell_name_and_town_the_first_is_right_and_some_below_are_not(world):
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


def test_full_image_search_tells_the_name_alone_and_text_search_the_town():
    full = toy.World(1, perfect(toy.FULL))
    towns = {concept.town for concept in full.concepts}
    town_of = {concept.name: concept.town for concept in full.concepts}
    below = 0
    for example in full.questions("unknown_two_hop", 200, "hops"):
        titles = [hit.title for hit in full.web.image_search(example.image).hits]
        assert not towns & set(" ".join(titles).split())
        name = titles[0].split()[0]
        lines = [hit.title.split() for hit in full.web.text_search(f"{name} town").hits]
        assert lines[0][0] == name and lines[0][2] == example.answers[0]
        assert all(town_of[line[0]] == line[2] for line in lines), "pages on something else are true of that"
        below += sum(line[0] != name for line in lines[1:])
    assert abs(below / 400 - toy.DISTRACTION) < 0.09


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [0.07, 0.3])
def test_searches_mislead_as_often_as_they_are_said_to(wrong):
    world = toy.World(2, dataclasses.replace(toy.FULL, wrong=wrong))
    examples = world.questions("held_out", 1000, "wrong")
    misled = sum(world.web.image_search(e.image).hits[0].title.split()[0] != e.answers[0] for e in examples)
    assert abs(misled / 1000 - wrong) < 0.04
    for pool in world.settings.pools:  # every pool alike: 24 concepts by the throw of a die could be all sound
        first = [world.web.text_search(c.name).hits[0].title.split()[0] != c.name for c in world.of(pool.name)]
        assert sum(first) == round(wrong * pool.size)


def test_thumbnails_show_what_the_titles_are_about():
    world = toy.World(0, dataclasses.replace(toy.FULL, thumbnails=True))
    example = world.questions("unfamiliar", 1, "thumbnails")[0]
    hits = world.web.image_search(example.image).hits
    emblem_of = {concept.name: concept.emblem for concept in world.concepts}
    for hit in hits:
        assert load_image(hit.image, 56 * 56, 56 * 56).tokens == 4
        patches = load_image(hit.image, 56 * 56, 56 * 56).patches
        distance = {}
        for concept in [*world.of("unfamiliar")[:20], *(c for c in world.concepts if c.name == hit.title.split()[0])]:
            many = toy.render(np.stack([emblem_of[concept.name]] * 10), np.random.default_rng(0))
            shown = [load_image(toy.png(picture), 56 * 56, 56 * 56).patches for picture in many]
            distance[concept.name] = min(float((patches - other).square().mean()) for other in shown)
        assert min(distance, key=distance.get) == hit.title.split()[0]
    assert world.web.image_search(example.image) == world.web.image_search(example.image)
    assert not any(hit.image for hit in world.web.text_search(hits[0].title).hits)
    assert not any(hit.image for hit in toy.World(0, toy.FULL).web.text_search(hits[0].title).hits)


def test_web_knows_pictures_by_their_bytes_and_honestly_finds_no_others(world):
    example = world.questions("familiar", 1, "bytes")[0]
    concept = next(c for c in world.of("familiar") if example.answers[0] in (c.name, c.town))
    fresh = toy.png(toy.render(concept.emblem[None], np.random.default_rng(99))[0])
    for unknown in (fresh, example.image + b"\0", b""):
        seen = world.web.image_search(unknown)
        assert seen.ok and not seen.hits and seen.error is None
    assert world.web.image_search(bytes(example.image)).hits


def test_text_search_finds_names_and_nothing_else(full):
    concept = full.concepts[77]
    assert full.web.text_search(f"{concept.name} town") == full.web.text_search(f"town of {concept.name}")
    for query in ("", "nobody's town", concept.town):
        seen = full.web.text_search(query)
        assert seen.ok and not seen.hits


def test_always_search_asks_for_what_the_first_title_names(full):
    """It is a policy, not an oracle: a misleading picture search leads it to another town."""
    for example in full.questions("familiar_fact", 60, "always"):
        found = full.web.image_search(example.image).hits[0].title.split()[0]
        assert full.always_search(example) == [toy.LOOK_IT_UP, toy.look_up(found)]
        assert full.always_search(example, texts=False) == [toy.LOOK_IT_UP]
    assert all(full.always_search(e) == [toy.LOOK_IT_UP] for e in full.questions("familiar", 5, "always"))


def test_always_search_in_the_basic_world_is_one_search(world):
    assert {len(world.always_search(e)) for e in world.questions("familiar", 4, "always")} == {1}
