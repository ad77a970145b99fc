"""The toy world of examples/crop_and_search_toy.py: only the right half of a picture leads to the answer."""

import pytest
from chat_helpers import turns_of

from examples.crop_and_search_toy import LEFT_RIGHT, OPTIONS, PAIRS, PairTraces, PairWorld
from mmsr.chat import PROMPTS, Chat
from mmsr.config import parse
from mmsr.more_tools.crop import as_png, cut
from mmsr.more_tools.crop import tools as crop_tools
from mmsr.system.images import decode
from mmsr.tools import search_tools
from mmsr.toy import base as toy_base


@pytest.fixture(scope="module")
def pairs():
    return PairWorld(0)


def test_only_the_half_that_is_asked_for_leads_to_the_answer(pairs):
    for category in PAIRS:
        for example in pairs.questions(category, 20, "test"):
            assert not pairs.web.image_search(example.image).hits
            for side, box in LEFT_RIGHT.items():
                seen = pairs.web.image_search(as_png(cut(decode(example.image), box)))
                assert (example.answers[0] in seen.hits[0].title.split()) == (side == category.name)


@pytest.mark.slow
def test_traces_name_boxes_whatever_is_asked(pairs, tmp_path):
    """Were the warm start to teach the right side, there would be nothing left to learn."""
    toy_base.build_tokenizer().save(str(tmp_path / "tokenizer.json"))
    chat = Chat(tmp_path, PROMPTS / "toy", search_tools(pairs.web, 1, 0) + crop_tools(pairs.web))
    traces, options = PairTraces(pairs, chat, 0), parse(OPTIONS)
    right, crops = 0, 0
    for episode in (traces.pair(i) for i in range(80)):
        assert len(episode.input_ids) < options.max_tokens and sum(episode.loss_mask) > 0
        action = chat.parse(turns_of(chat, episode, options.turn_tokens)[0])
        if action.name == "crop_search":
            crops, side = crops + 1, episode.example.question.split()[2]
            right += action.query == LEFT_RIGHT[side]
    assert 25 < crops < 55 and 0.25 < right / crops < 0.75
