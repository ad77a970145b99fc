"""The tool `crop` on the real rollout, and the toy world in which it is learned."""

import io

import PIL.Image
import pytest
from picture_files import turned
from test_rollout import REPLY, home, make, question, tool_text  # noqa: F401

from mmsr import reward
from mmsr.chat import PROMPTS, Chat
from mmsr.config import parse
from mmsr.episode import Hit, Observation
from mmsr.more_tools.crop import CROP_SEARCH, cut, tools
from mmsr.system.images import decode
from mmsr.tools import Call, search_tools
from train import open_setup


class Gallery:
    """A back-end that knows pictures by their sizes."""

    def image_search(self, image, question, image_url=""):
        size = PIL.Image.open(io.BytesIO(image)).size
        return Observation((Hit("%d by %d" % size),), source="gallery")

    def text_search(self, query):
        return Observation()


def rollout_of(home, *turns):  # noqa: F811
    every = [*search_tools(Gallery(), 1, 1), *tools(Gallery())]
    (episode,) = make(home, tools=every, say=lambda episode, turn: turns[turn])([question()], 1)
    reward.score([episode], reward.RewardRule(), Chat(home.folder, PROMPTS / "real", every).well_formed)
    return episode


def box(text):
    return f"<reason>the left one</reason> <crop_search>{text}</crop_search>"


def test_named_part_is_searched_and_its_shape_earns_format(home):  # noqa: F811
    episode = rollout_of(home, box("0 0 500 1000"), REPLY)
    assert "28 by 56" in tool_text(episode) and episode.searches(CROP_SEARCH) == 1
    assert episode.reward_parts == {"accuracy": 1, "format": 1, "penalty": pytest.approx(0.09)}


def test_what_is_no_box_finds_nothing_and_is_no_failure_of_the_engine(home):  # noqa: F811
    episode = rollout_of(home, box("the left one"), REPLY)
    seen = episode.turns[1].observation
    assert seen.ok and not seen.hits and episode.status == "answered"


def test_second_crop_is_over_the_limit(home):  # noqa: F811
    episode = rollout_of(home, box("0 0 500 1000"), box("500 0 1000 1000"), REPLY)
    assert episode.turns[3].observation.source == "limit" and episode.searches() == 1


@pytest.mark.parametrize(
    "query, size",
    [
        ("0 0 1000 1000", (56, 56)),
        ("[250, 250, 750, 1000]", (28, 42)),
        ("0 0 9999 500", (56, 28)),
        ("0 0 500", None),
        ("0 0 500 1000 7", None),
        ("500 0 500 1000", None),
        ("800 0 200 1000", None),
        ("0 0 10 10", None),
        ("١ ٢ ٣ ٤", None),
        ("0 0 99999999999999999999 10", None),
        ("", None),
    ],
)
def test_box_is_cut_or_refused_without_raising(query, size):
    found = cut(decode(question().image), query)
    assert (found and found.size) == size


def test_a_box_is_cut_from_other_pixels_than_the_model_saw_or_searched_on_its_side():
    asked = []
    backend = Gallery()
    backend.image_search = lambda image, question, image_url="": asked.append(image) or Observation()
    (tool,) = tools(backend)
    tool.run(Call("0 0 1000 500", turned(6, size=(48, 32)), "?"))  # stored as 32 x 48: the upper half is the right one
    part = decode(asked[0])
    assert part.size == (24, 32) and part.getpixel((12, 8))[0] < 50 and part.getpixel((12, 24))[0] > 200


def test_option_offers_the_tool_to_a_run(folder):
    options = ["--recipe", "toy", "--toy", "basic", "--model", str(folder), "--tools", "crop"]
    setup = open_setup(parse(options))
    assert list(setup.toolbox.tools) == ["image_search", "text_search", CROP_SEARCH]
    assert setup.chat.parse(box("0 0 500 1000")).name == CROP_SEARCH
