"""The toy world of examples/three_hops_toy.py: only the long road, or a look at what is known, leads to the answer."""

import numpy as np
import pytest
from chat_helpers import turns_of

from examples import three_hops_toy
from examples.crop_and_search_toy import LEFT_RIGHT, look_at
from examples.three_hops_toy import CATEGORIES, OPTIONS, PIXELS, TOOLS, HopsTraces, HopsWorld, address_of, zoom_to
from mmsr.chat import PROMPTS, Chat
from mmsr.config import parse
from mmsr.more_tools.crop import as_png, cut
from mmsr.reward import RewardRule, score
from mmsr.rollout import Limits, Rollout, Script
from mmsr.system.images import decode
from mmsr.tools import Call, Toolbox, more_tools, search_tools
from mmsr.toy import base as toy_base
from mmsr.vision import load_image


@pytest.fixture(scope="module")
def world():
    return HopsWorld(0)


@pytest.fixture(scope="module")
def chat(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    toy_base.build_tokenizer().save(str(folder / "tokenizer.json"))
    return Chat(folder, PROMPTS / "toy", tools_of(world))


def tools_of(world):
    return search_tools(world.web, 1, 2) + more_tools(TOOLS, world.web)


def test_one_search_or_two_lead_to_the_town_or_the_other_half_does(world):
    for category in CATEGORIES:
        for example in world.questions(category, 12, "test"):
            town, side = example.answers[0], example.question.split()[3]
            assert not world.web.image_search(example.image).hits, "the whole picture"
            for half, box in LEFT_RIGHT.items():
                titles = world.web.image_search(as_png(cut(decode(example.image), box))).hits
                assert not any(town in hit.title.split() for hit in titles), "the name alone"
                if half == side and titles[0].title.split()[0] not in world.web.misleading:
                    name = titles[0].title.split()[0]
                    page = world.web.text_search(name).hits[0]
                    assert page.url == address_of(name) and town not in f"{page.title} {page.text}".split()
                    told = world.web.read_page(page.url).hits[0].text.split()[-1]
                    right = next(concept for concept in world.concepts if concept.name == name)
                    assert told == right.town


def test_a_small_emblem_has_as_many_pixels_as_a_closer_look(world):
    example = world.questions(CATEGORIES[0], 1, "test")[0]
    zoom = {tool.name: tool for tool in tools_of(world)}["zoom"]
    (hit,) = zoom.run(Call(LEFT_RIGHT["left"], example.image, "?")).hits
    assert load_image(example.image, PIXELS, PIXELS).tokens == 2, "one for each emblem"
    assert load_image(hit.image, PIXELS, PIXELS, True).tokens == 4, "as the base model was shown it"


def test_the_long_road_does_not_fit_the_limits_or_earns_no_format(world, chat):
    """Played by force in the real rollout, with the limits of the example."""
    options = parse(OPTIONS)
    example = world.questions(CATEGORIES[2], 1, "test")[0]
    looks = [zoom_to("left"), zoom_to("right")]
    turns = [*looks, *world.always_search(example), toy_base.copied(example.answers[0])]
    engine = FakeEngine(options)
    limits = Limits(options.max_turns, PIXELS, PIXELS)
    rollout = Rollout(engine, chat, Toolbox(tools_of(world), inline=True), limits)
    (episode,) = rollout([example], 1, scripts=lambda example, sample: Script(turns))
    score([episode], RewardRule(per_call=True, any_shape=True), chat.well_formed)
    assert (episode.status, episode.answer, episode.searches()) == ("answered", example.answers[0], 3)
    assert episode.reward_parts["format"] == 1
    assert max(len(chat.assistant(turn)) for turn in turns) <= options.turn_tokens
    assert len(episode.input_ids) < options.max_tokens - options.turn_tokens, "with two looks, and room for a mistake"


@pytest.mark.parametrize(
    "words, said",
    [
        (["--steps", "0"], "--steps 0: give a number from 1"),
        (["--tools", "krop"], "--tools krop: unknown"),
        (["--search", "local:nope.index"], "no such file"),
        (["--out", "tests/conftest.py"], "--out tests/conftest.py"),
    ],
)
def test_a_mistake_is_told_after_the_minutes_of_a_warm_start(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(three_hops_toy, "base_model", lambda world: pytest.fail("a warm start"))
    with pytest.raises(SystemExit) as ended:
        three_hops_toy.main(["--out", str(tmp_path / "out"), *words])
    told = capsys.readouterr().err
    assert ended.value.code == 2 and said in told and told.count("\n") == 1


class FakeEngine:
    """What a rollout asks of an engine where every turn is forced."""

    busy = False
    counts = {"prefilled": 0, "parked": 0, "images_encoded": 0}

    def __init__(self, options):
        self.max_tokens = options.max_tokens

    def submit(self, groups):
        assert not groups
        return []


def test_traces_take_the_right_side_or_tell_what_to_do(world, chat):
    """Were the warm start to teach the order, or for whom it is, there would be nothing left to learn."""
    traces, options = HopsTraces(world, chat, 0), parse(OPTIONS)
    sides, roads = [], []
    for episode in (traces.pair(i) for i in range(120)):
        assert len(episode.input_ids) < options.max_tokens
        turns = turns_of(chat, episode, options.turn_tokens)
        asked = episode.example.question.split()[3]
        boxes = [chat.parse(turn).query for turn in turns if chat.parse(turn).name in ("zoom", "crop_search")]
        sides += [box == LEFT_RIGHT[asked] for box in boxes]
        roads.append(tuple(chat.parse(turn).name for turn in turns))
        assert all(chat.well_formed(turn) for turn in turns)
    assert 0.35 < np.mean(sides) < 0.65
    for road in (("answer",), ("zoom", "answer"), ("crop_search", "text_search", "visit", "answer")):
        assert 5 < roads.count(road) < 60, road
    assert look_at("left").startswith("<reason>")


def test_a_run_sees_pictures_of_another_size_than_the_traces():
    options = parse(OPTIONS)
    assert options.min_pixels == options.max_pixels == PIXELS
