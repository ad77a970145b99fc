"""The decoder and its positions against transformers."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    IMAGE,
    conversation,
    each_family,
    hf_logits,
    hf_twin,
    largest_difference,
    packed_logits,
    random_image,
    report,
    tiny_model,
)

from mmsr import model as model_module
from mmsr.attention import Packed, SharedPrefix
from mmsr.model import logits, mrope_positions


def second():
    return random_image(4, 4, 2)


def sequences():
    """Text alone, one picture, pictures in later turns and at both ends: four lengths."""
    first = random_image(10, 14, 1)
    third = random_image(2, 22, 3)
    return [
        conversation(0, 7),
        conversation(1, 5, first, 9),
        conversation(2, 3, second(), 6, third, 1, first, 4),
        conversation(3, second(), 2, second()),
    ]


# ---- positions


@each_family
def test_positions_differ_from_transformers():
    twin = hf_twin(tiny_model()).model
    for ids, images in sequences()[1:]:
        kinds = (ids == IMAGE).int()
        grids = torch.tensor([(1, *image.grid) for _, image in images])
        theirs, delta = twin.get_rope_index(ids[None], mm_token_type_ids=kinds[None], image_grid_thw=grids)
        ours, following = mrope_positions(len(ids), [(offset, image.grid) for offset, image in images])
        # transformers cannot tell two neighbouring pictures apart; ours needs no such rule, and none of these touch.
        assert torch.equal(ours, theirs[:, 0]) and following == len(ids) + delta.item()


def test_the_positions_of_the_docstrings_example_are_others():
    found, following = mrope_positions(10, [(2, (4, 6))])
    assert found.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6],
    ]
    assert following == 7


def test_positions_jump_between_the_pieces_of_a_conversation():
    turns = [
        (5, [(1, (4, 4))]),
        (9, []),
        (12, [(0, (2, 6)), (8, (4, 2))]),
        (0, []),
        (3, []),
    ]
    start = 0
    pieces = []
    whole = []
    done = 0
    for length, images in turns:
        piece, start = mrope_positions(length, images, start)
        pieces.append(piece)
        whole += [(done + offset, grid) for offset, grid in images]
        done += length
    together, following = mrope_positions(done, whole)
    assert torch.equal(torch.cat(pieces, 1), together) and start == following == together.max() + 1


@pytest.mark.parametrize("images", [[(3, (4, 4))], [(0, (4, 4)), (3, (2, 2))]])
def test_a_picture_over_the_edge_is_squeezed_in(images):
    with pytest.raises(ValueError, match="image tokens 3"):
        mrope_positions(6, images)


# ---- forward and backward


@each_family
@pytest.mark.parametrize("tied", [True, False])
def test_packed_logits_differ_from_transformers_one_at_a_time(tied, record_property):
    model = tiny_model(tie_word_embeddings=tied)
    twin = hf_twin(model)
    with torch.no_grad():
        ours = packed_logits(model, sequences())
        theirs = torch.cat([hf_logits(twin, *sequence) for sequence in sequences()])
    difference = largest_difference(ours, theirs) / theirs.abs().max().item()
    report(record_property, f"logits, relative to the largest, {'tied' if tied else 'untied'}", difference)
    assert ours.shape == theirs.shape and difference < 1e-5


@each_family
@pytest.mark.parametrize("tied", [True, False])
def test_gradients_differ_from_transformers(tied, record_property):
    model = tiny_model(tie_word_embeddings=tied)
    twin = hf_twin(model)
    our_logits = packed_logits(model, sequences())
    their_logits = torch.cat([hf_logits(twin, *sequence) for sequence in sequences()])
    our_logits.logsumexp(-1).sum().backward()
    their_logits.logsumexp(-1).sum().backward()
    theirs = dict(twin.named_parameters())
    worst = 0.0
    for name, parameter in model.named_parameters():
        name = name.replace("model.", "model.language_model.", 1).replace("visual.", "model.visual.", 1)
        scale = theirs[name].grad.abs().max().item()
        worst = max(worst, largest_difference(parameter.grad, theirs[name].grad) / scale)
    report(record_property, f"gradients, relative to each tensor's largest, {'tied' if tied else 'untied'}", worst)
    assert len(theirs) == len(list(model.parameters())) and worst < 1e-5


@each_family
def test_half_precision_strays_further_than_transformers(record_property):
    exact = tiny_model()
    ids, images = sequences()[1]
    with torch.no_grad():
        wanted = packed_logits(exact, [(ids, images)])
        theirs = hf_logits(hf_twin(exact).bfloat16(), ids, images)
        ours = packed_logits(exact.bfloat16(), [(ids, images)])
    ours_off = (ours.float() - wanted).pow(2).mean().sqrt().item()
    theirs_off = (theirs.float() - wanted).pow(2).mean().sqrt().item()
    report(record_property, "bf16 logits from fp32 ones, root mean square: ours", ours_off)
    report(record_property, "bf16 logits from fp32 ones, root mean square: transformers", theirs_off)
    assert ours_off < 1.2 * theirs_off


def output_and_gradients(ids, where, attention_fn, copies, keep, recompute):
    """Logits at `keep` and the gradient of every parameter, of a pass that holds second() `copies` times."""
    model = tiny_model()
    model.checkpoint_blocks = recompute
    model.visual.checkpoint_blocks = recompute
    features = model.encode_images([second()]).repeat(copies, 1)
    image_index = (ids == IMAGE).nonzero()[:, 0]
    out = model(ids, where, attention_fn, features, image_index, head_fn=logits)
    out = out[keep]
    out.logsumexp(-1).square().sum().backward()
    return [out, *(parameter.grad for parameter in model.parameters())]


def shared_and_repeated(recompute: bool):
    """A prompt with three members' suffixes: the prompt once in the pass, and once per member."""
    prompt, images = conversation(0, 4, second(), 5)
    prompt_at, following = mrope_positions(len(prompt), [(offset, image.grid) for offset, image in images])
    members = []
    members_at = []
    for seed, length in ((1, 6), (2, 1), (3, 9)):
        member, _ = conversation(seed, length)
        member_at, _ = mrope_positions(length, [], following)
        members.append(member)
        members_at.append(member_at)

    ids = torch.cat([prompt, *members])
    where = torch.cat([prompt_at, *members_at], 1)
    layout = SharedPrefix([(len(prompt), [len(member) for member in members])], "cpu")
    shared = output_and_gradients(ids, where, layout, 1, slice(len(prompt), None), recompute)

    whole = [torch.cat([prompt, member]) for member in members]
    whole_at = [torch.cat([prompt_at, member_at], 1) for member_at in members_at]
    suffixes = [torch.arange(len(ids)) >= len(prompt) for ids in whole]
    layout = Packed([len(ids) for ids in whole], "cpu")
    repeated = output_and_gradients(
        torch.cat(whole), torch.cat(whole_at, 1), layout, len(members), torch.cat(suffixes), recompute
    )
    return shared, repeated


@each_family
@pytest.mark.parametrize("recompute", [False, True])
def test_sharing_a_prompt_changes_the_update(recompute, record_property):
    worst = 0.0
    for shared, repeated in zip(*shared_and_repeated(recompute)):
        worst = max(worst, largest_difference(shared, repeated) / repeated.abs().max().item())
    report(record_property, f"shared against repeated prompt, {'recomputed' if recompute else 'kept'} blocks", worst)
    assert worst < 1e-5


@each_family
@pytest.mark.parametrize("kept, recomputed", [(0, [0, 1, 2]), (1, [0, 1]), (2, [0]), (3, []), (7, [])])
def test_blocks_that_keep_everything_are_not_the_last(kept, recomputed, monkeypatch):
    """The last blocks' memory is free first in the backward pass."""
    found = []
    plain = model_module.run_block

    def watched(block, again, *rest):
        found.append(again)
        return plain(block, again, *rest)

    monkeypatch.setattr("mmsr.model.run_block", watched)
    monkeypatch.setattr("mmsr.qwen3_vl.run_block", watched)
    model = tiny_model(1, num_hidden_layers=3)
    model.checkpoint_blocks = True
    model.kept_blocks = kept
    ids, _ = conversation(0, 7)
    where, _ = mrope_positions(len(ids), [])
    hidden = model(ids, where, Packed([len(ids)], "cpu"))
    hidden.sum().backward()
    assert len(found) == 3 and [layer for layer, again in enumerate(found) if again] == recomputed


@each_family
def test_a_forward_pass_without_gradient_recomputes_blocks(monkeypatch):
    monkeypatch.setattr("mmsr.vision.checkpoint", lambda *_, **__: pytest.fail("recomputed"))
    model = tiny_model()
    model.checkpoint_blocks = model.visual.checkpoint_blocks = True
    with torch.no_grad():
        packed_logits(model, sequences()[:2])
