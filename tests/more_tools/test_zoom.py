"""The tool `zoom` on the real rollout: a part of the picture, at full size, without a penalty."""

import io
from dataclasses import replace

import PIL.Image
import pytest
from picture_files import turned
from test_rollout import REPLY, home, make, question, tool_text  # noqa: F401

from mmsr import reward
from mmsr.chat import PROMPTS, Chat
from mmsr.config import parse
from mmsr.evaluate import measures
from mmsr.more_tools.zoom import ZOOM, tools
from mmsr.plan import LOOKS, Activations, model_sizes
from mmsr.report.html import searches
from mmsr.system.images import decode
from mmsr.tools import Call, NoSearch, search_tools

ASK = "<reason>a fact</reason> <text_search>bridge lisbon</text_search>"


def look(box: str) -> str:
    return f"<reason>it is small</reason> <zoom>{box}</zoom>"


def large(size=(448, 448)) -> bytes:
    """A picture whose right half is green."""
    picture = PIL.Image.new("RGB", size, "red")
    picture.paste("green", (size[0] // 2, 0, *size))
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def rollout_of(home, *turns, image=None, thumbnail=56 * 56, most=112 * 112):  # noqa: F811
    """A scored episode in which the model says this, with thumbnails and pictures of so many pixels at most."""
    every = [*search_tools(NoSearch(), 1, 1), *tools(NoSearch())]
    rollout = make(home, tools=every, turns=7, say=lambda episode, turn: turns[turn])
    rollout.limits = replace(rollout.limits, max_pixels=most)
    rollout.thumbnails.max_pixels, rollout.thumbnails.thumbnail_pixels = most, thumbnail
    (episode,) = rollout([replace(question(), image=image or large())], 1)
    reward.score([episode], reward.RewardRule(), Chat(home.folder, PROMPTS / "real", every).well_formed)
    return episode


def test_a_closer_look_costs_or_counts_as_a_search_or_loses_the_format(home):  # noqa: F811
    episode = rollout_of(home, look("500 0 1000 1000"), look("0 0 250 250"), REPLY)
    assert episode.status == "answered" and episode.searches() == 0 and episode.searches(ZOOM) == 2
    assert episode.reward_parts == {"accuracy": 1, "format": 1, "penalty": 0}
    numbers = measures(episode)
    assert numbers["search_ratio"] == 0 and numbers["search_ratio_zoom"] == 1
    record = episode.record()
    assert [turn.get("is_search") for turn in record["turns"]] == [None, False, None, False, None]
    assert searches(record) == 0


def test_a_search_between_two_looks_is_free_or_of_another_shape(home):  # noqa: F811
    episode = rollout_of(home, look("0 0 500 500"), ASK, look("0 0 250 250"), REPLY)
    assert episode.searches() == 1
    assert episode.reward_parts == {"accuracy": 1, "format": 1, "penalty": pytest.approx(0.09)}
    twice = rollout_of(home, ASK, look("0 0 500 500"), ASK, REPLY)
    assert twice.reward_parts["format"] == 0, "the second search is over its limit"


def test_the_part_is_shown_as_a_thumbnail(home):  # noqa: F811
    """Its pixels are those of the file: more than the question's picture shows, up to --max-pixels."""
    episode = rollout_of(home, look("500 0 1000 1000"), look("0 0 100 100"), REPLY)
    (_, whole), (_, half), (_, little) = episode.images
    assert whole.grid == (8, 8), "112 x 112 pixels of the 448 x 448"
    assert half.grid == (10, 4), "224 x 448, in as many pixels"
    assert little.grid[0] * little.grid[1] <= 16, "44 x 44 pixels are all that there are"


def test_the_memory_plan_knows_nothing_of_looks():
    plain, zooming = (
        parse(["--model", "Qwen2.5-VL-7B", "--max-turns", "6", *more]) for more in ([], ["--tools", "zoom"])
    )
    model = model_sizes("Qwen2.5-VL-7B")
    tokens = plain.max_pixels // 28**2
    more = Activations(model, zooming, 2).pictures(10) - Activations(model, plain, 2).pictures(10)
    assert more == 10 * plain.group_size * LOOKS * tokens and LOOKS == tools(NoSearch())[0].limit


def test_fifth_look_is_shown(home):  # noqa: F811
    episode = rollout_of(home, *[look(f"0 0 {n}00 500") for n in range(3, 8)], REPLY)
    sources = [turn.observation.source for turn in episode.turns if turn.role == "tool"]
    assert sources == [ZOOM] * 4 + ["limit"] and episode.reward_parts["format"] == 0


def test_what_is_no_box_is_a_failure_or_shown(home):  # noqa: F811
    episode = rollout_of(home, look("the left one"), REPLY)
    seen = episode.turns[1].observation
    assert seen.ok and not seen.hits and "found nothing" in tool_text(episode)


def test_a_part_that_cannot_be_shown_gives_an_empty_result():
    (tool,) = tools(NoSearch())
    picture = large((1000, 1000))
    assert tool.run(Call("0 500 1000 503", picture, "?")).hits == (), "1000 x 3 pixels"
    (hit,) = tool.run(Call("0 0 1000 1000", large((5000, 4000)), "?")).hits
    assert decode(hit.image).size == (2048, 1638), "not 20 million pixels in each rollout"


def test_a_part_of_a_picture_on_its_side_is_turned_although_the_model_sees_it_so():
    (tool,) = tools(NoSearch())
    (hit,) = tool.run(Call("0 0 1000 500", turned(6, size=(48, 32)), "?")).hits  # stored as 32 x 48
    whole, part = decode(turned(6, size=(48, 32)), upright=False), decode(hit.image)
    assert whole.size == (32, 48) and part.size == (32, 24)
    assert part.getpixel((16, 12)) == pytest.approx(whole.getpixel((16, 12)), abs=8)
