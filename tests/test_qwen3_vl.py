"""What only Qwen3-VL has. That the whole of it equals transformers' is tested with Qwen2.5-VL, in the tests with
`each_family`: logits, gradients, tower, positions, pixels, greedy tokens, folders."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import IMAGE, conversation, hf_twin, largest_difference, positions, random_image, tiny_config, tiny_model

from mmsr.attention import Packed
from mmsr.qwen3_vl import layout, rotary, rotary_axes


@pytest.fixture(autouse=True)
def qwen3(monkeypatch):
    monkeypatch.setattr("helpers.FAMILY", "qwen3")


def test_the_axes_of_the_docstrings_example_are_others():
    assert rotary_axes((4, 2, 2), torch.device("cpu")).tolist() == [0, 1, 2, 0, 1, 2, 0, 0]


def test_published_heads_turn_otherwise_than_transformers():
    """With sections 24, 20, 20: the last four frequencies turn with time."""
    from transformers import Qwen3VLTextConfig
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

    rope = {"rope_type": "default", "mrope_section": [24, 20, 20], "rope_theta": 5e6}
    theirs = Qwen3VLTextRotaryEmbedding(Qwen3VLTextConfig(rope_parameters=rope))
    where = positions(*conversation(0, 900, random_image(30, 44), 5))
    config = tiny_config(head_dim=128, mrope_section=(24, 20, 20), rope_theta=5e6)
    for ours, whole in zip(rotary(where, config), theirs(torch.zeros(1), where[:, None])):
        assert torch.equal(ours[:, 0], whole[0, :, :64])


@pytest.mark.parametrize("grid", [(2, 2), (4, 6), (12, 12), (10, 14), (2, 30)])
def test_a_table_of_places_is_stretched_otherwise_than_by_torch(grid):
    side = 6
    table = torch.randn(side**2, 5)
    found = layout(grid, side, 16)
    ours = (table[found.places] * found.weights[..., None]).sum(1)  # (P, 5)
    square = table.T.reshape(1, 5, side, side)
    whole = F.interpolate(square, size=grid, mode="bilinear", align_corners=True)[0]  # (5, rows, columns)
    tokens = whole.reshape(5, grid[0] // 2, 2, grid[1] // 2, 2).permute(1, 3, 2, 4, 0)  # by merged tokens
    assert largest_difference(ours, tokens.reshape(-1, 5)) < 1e-5


def test_a_level_of_deepstack_is_added_before_its_block_or_to_other_tokens():
    """What the blocks get: the first level is added to the picture's tokens, and to no other, after the first block."""
    model = tiny_model()
    ids, images = conversation(0, 4, random_image(4, 6), 3)
    index = (ids == IMAGE).nonzero()[:, 0]
    size = model.config.hidden_size

    def inputs(features):
        seen = []
        hooks = [
            layer.register_forward_pre_hook(lambda _, given: seen.append(given[0])) for layer in model.model.layers
        ]
        model(ids, positions(ids, images), Packed([len(ids)], "cpu"), features, index)
        for hook in hooks:
            hook.remove()
        return seen

    with torch.no_grad():
        features = model.encode_images([image for _, image in images])
        plain = inputs(features)
        changed = inputs(features + torch.cat([torch.zeros(size), torch.ones(size), torch.zeros(size)]))
    added = torch.zeros(len(ids), size)
    added[index] = 1
    assert torch.equal(plain[0], changed[0])
    assert largest_difference(changed[1] - plain[1], added) < 1e-5


def test_text_alone_needs_a_picture():
    model = tiny_model()
    ids, images = conversation(0, 9)
    where = positions(ids, images)
    with torch.no_grad():
        hidden = model(ids, where, Packed([len(ids)], "cpu"))
        theirs = hf_twin(model).model.language_model(input_ids=ids[None], position_ids=where[:, None])
    assert largest_difference(hidden, theirs.last_hidden_state[0]) < 1e-5 * hidden.abs().max()
