"""The decoder, positions and log-probabilities against transformers."""

from __future__ import annotations

import weakref

import pytest
import torch
from helpers import (
    IMAGE,
    conversation,
    hf_logits,
    hf_twin,
    largest_difference,
    packed_logits,
    random_image,
    report,
    tiny_model,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmsr import model as model_module
from mmsr.attention import Packed, SharedPrefix
from mmsr.model import log_probs, logits, mrope_positions

FIRST, SECOND, THIRD = random_image(10, 14, 1), random_image(4, 4, 2), random_image(2, 22, 3)


def sequences():
    """Text alone, one picture, pictures in later turns and at both ends: four lengths."""
    return [
        conversation(0, 7),
        conversation(1, 5, FIRST, 9),
        conversation(2, 3, SECOND, 6, THIRD, 1, FIRST, 4),
        conversation(3, SECOND, 2, SECOND),
    ]


# ---- positions


def test_positions_differ_from_transformers():
    twin = hf_twin(tiny_model()).model
    for ids, images in sequences()[1:]:
        kinds = (ids == IMAGE).int()
        grids = torch.tensor([(1, *image.grid) for _, image in images])
        theirs, delta = twin.get_rope_index(ids[None], mm_token_type_ids=kinds[None], image_grid_thw=grids)
        ours, following = mrope_positions(len(ids), [(offset, image.grid) for offset, image in images])
        # transformers cannot tell two neighbouring pictures apart; ours needs no such rule, and none of these touch.
        assert torch.equal(ours, theirs[:, 0]) and following == len(ids) + delta.item()


def test_positions_jump_between_the_pieces_of_a_conversation():
    turns = [(5, [(1, (4, 4))]), (9, []), (12, [(0, (2, 6)), (8, (4, 2))]), (0, []), (3, [])]
    start, pieces, whole, done = 0, [], [], 0
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


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_differ_from_transformers(tied, record_property):
    model = tiny_model(tie_word_embeddings=tied)
    twin = hf_twin(model)
    torch.logsumexp(packed_logits(model, sequences()), -1).sum().backward()
    torch.logsumexp(torch.cat([hf_logits(twin, *sequence) for sequence in sequences()]), -1).sum().backward()
    theirs = dict(twin.named_parameters())
    worst = 0.0
    for name, parameter in model.named_parameters():
        name = name.replace("model.", "model.language_model.", 1).replace("visual.", "model.visual.", 1)
        scale = theirs[name].grad.abs().max().item()
        worst = max(worst, largest_difference(parameter.grad, theirs[name].grad) / scale)
    report(record_property, f"gradients, relative to each tensor's largest, {'tied' if tied else 'untied'}", worst)
    assert len(theirs) == len(list(model.parameters())) and worst < 1e-5


def test_half_precision_strays_further_than_transformers(record_property):
    exact = tiny_model()
    ids, images = sequences()[1]
    with torch.no_grad():
        wanted = packed_logits(exact, [(ids, images)])
        theirs = hf_logits(hf_twin(exact).bfloat16(), ids, images)
        ours = packed_logits(exact.bfloat16(), [(ids, images)])
    ours_off, theirs_off = ((x.float() - wanted).pow(2).mean().sqrt().item() for x in (ours, theirs))
    report(record_property, "bf16 logits from fp32 ones, root mean square: ours", ours_off)
    report(record_property, "bf16 logits from fp32 ones, root mean square: transformers", theirs_off)
    assert ours_off < 1.2 * theirs_off


def output_and_gradients(ids, where, attention_fn, copies, keep, recompute):
    """Logits at `keep` and the gradient of every parameter, of a pass that holds SECOND `copies` times."""
    model = tiny_model()
    model.checkpoint_blocks = model.visual.checkpoint_blocks = recompute
    features = model.encode_images([SECOND]).repeat(copies, 1)
    out = model(ids, where, attention_fn, features, (ids == IMAGE).nonzero()[:, 0], head_fn=logits)[keep]
    out.logsumexp(-1).square().sum().backward()
    return [out, *(parameter.grad for parameter in model.parameters())]


def shared_and_repeated(recompute: bool):
    """A prompt with three members' suffixes: the prompt once in the pass, and once per member."""
    prompt, images = conversation(0, 4, SECOND, 5)
    members = [conversation(seed, length)[0] for seed, length in ((1, 6), (2, 1), (3, 9))]
    prompt_at, following = mrope_positions(len(prompt), [(offset, image.grid) for offset, image in images])
    members_at = [mrope_positions(len(member), [], following)[0] for member in members]
    lens = [len(member) for member in members]

    once = torch.cat([prompt, *members]), torch.cat([prompt_at, *members_at], 1)
    layout = SharedPrefix([(len(prompt), lens)], "cpu")
    shared = output_and_gradients(*once, layout, 1, slice(len(prompt), None), recompute)

    whole = [torch.cat([prompt, member]) for member in members]
    where = torch.cat([torch.cat([prompt_at, at], 1) for at in members_at], 1)
    keep = torch.cat([torch.arange(len(ids)) >= len(prompt) for ids in whole])
    layout = Packed([len(ids) for ids in whole], "cpu")
    return shared, output_and_gradients(torch.cat(whole), where, layout, len(members), keep, recompute)


@pytest.mark.parametrize("recompute", [False, True])
def test_sharing_a_prompt_changes_the_update(recompute, record_property):
    worst = 0.0
    for shared, repeated in zip(*shared_and_repeated(recompute)):
        worst = max(worst, largest_difference(shared, repeated) / repeated.abs().max().item())
    report(record_property, f"shared against repeated prompt, {'recomputed' if recompute else 'kept'} blocks", worst)
    assert worst < 1e-5


@pytest.mark.parametrize("kept, recomputed", [(0, [0, 1, 2]), (1, [0, 1]), (2, [0]), (3, []), (7, [])])
def test_blocks_that_keep_everything_are_not_the_last(kept, recomputed, monkeypatch):
    """The last blocks' memory is free first in the backward pass."""
    found = []
    plain = model_module.run_block
    monkeypatch.setattr(
        "mmsr.model.run_block", lambda block, again, *rest: found.append(again) or plain(block, again, *rest)
    )
    model = tiny_model(1, num_hidden_layers=3)
    model.checkpoint_blocks, model.kept_blocks = True, kept
    ids, images = conversation(0, 7)
    model(ids, mrope_positions(len(ids), [])[0], Packed([len(ids)], "cpu")).sum().backward()
    assert [layer for layer, again in enumerate(found) if again] == recomputed


def test_a_forward_pass_without_gradient_recomputes_blocks(monkeypatch):
    monkeypatch.setattr("mmsr.vision.checkpoint", lambda *_, **__: pytest.fail("recomputed"))
    model = tiny_model()
    model.checkpoint_blocks = model.visual.checkpoint_blocks = True
    with torch.no_grad():
        packed_logits(model, sequences()[:2])


# ---- log-probabilities


def scored(rows: int = 11, size: int = 8, vocabulary: int = 30):
    torch.manual_seed(0)
    hidden, head = torch.randn(rows, size, requires_grad=True), torch.randn(vocabulary, size, requires_grad=True)
    suppressed = torch.zeros(vocabulary, dtype=torch.bool)
    suppressed[:4] = True
    return hidden, head, torch.randint(4, vocabulary, (rows,)), suppressed


@pytest.mark.parametrize("rows", [1, 4, 11, 100])
def test_tiles_change_log_probabilities(rows, monkeypatch):
    hidden, head, targets, suppressed = scored()
    monkeypatch.setattr("mmsr.model.TILE", rows * len(head))
    logps, entropy = log_probs(hidden, head, targets, 0.7, suppressed)
    wanted = torch.distributions.Categorical(logits=(hidden @ head[4:].T) / 0.7)
    torch.testing.assert_close(logps, wanted.log_prob(targets - 4))
    torch.testing.assert_close(entropy, wanted.entropy())
    ours = torch.autograd.grad(logps.square().sum(), (hidden, head))
    for a, b in zip(ours, torch.autograd.grad(wanted.log_prob(targets - 4).square().sum(), (hidden, head))):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=5e-5)  # sums of 11 squares of around 10, in fp32


def test_a_banned_token_makes_entropy_nan_or_keeps_probability():
    hidden, head, targets, suppressed = scored()
    suppressed[5:] = True  # one token is left, its probability 1
    logps, entropy = log_probs(hidden, head, torch.full_like(targets, 4), suppressed=suppressed)
    assert torch.equal(entropy, torch.zeros(11)) and not entropy.requires_grad
    logps.sum().backward()
    assert hidden.grad.isfinite().all() and logits(hidden, head, 1.0, suppressed).softmax(-1)[:, suppressed].max() == 0


def test_no_rows_to_score_raise():
    hidden, head, targets, _ = scored(rows=0)
    logps, entropy = log_probs(hidden, head, targets)
    assert logps.shape == entropy.shape == (0,)


def test_half_precision_gives_half_precision_log_probabilities():
    hidden, head, targets, _ = scored()
    logps, entropy = log_probs(hidden.bfloat16(), head.bfloat16(), targets)
    assert logps.dtype == entropy.dtype == torch.float32


def test_head_gradient_of_half_precision_is_added_up_in_half_precision(monkeypatch, record_property):
    """Against fp32; autograd would add the tiles' shares up in bfloat16."""
    monkeypatch.setattr("mmsr.model.TILE", 4 * 30)
    hidden, head, targets, suppressed = (x.detach() for x in scored(rows=800))
    exact = head.bfloat16().float().requires_grad_()
    log_probs(hidden.bfloat16().float(), exact, targets, 1.0, suppressed)[0].sum().backward()
    half = head.bfloat16().requires_grad_()
    log_probs(hidden.bfloat16(), half, targets, 1.0, suppressed)[0].sum().backward()
    error = ((half.grad.float() - exact.grad).norm() / exact.grad.norm()).item()
    report(record_property, "bf16 gradient of the head from 200 tiles, relative error", error)
    assert error < 5e-3


def peak_memory(work) -> int:
    """Most bytes that torch's CPU allocator held at a time during `work`, beyond what it held before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    assert most > 0
    return most


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_logits_are_in_memory_at_once(dtype, monkeypatch, record_property):
    """A pack of 16,384 trained tokens with a 64th of the real vocabulary, and of the tile: forward and backward."""
    tokens, vocabulary, size = 16384, 152064 // 64, 16
    monkeypatch.setattr("mmsr.model.TILE", model_module.TILE // 64)
    hidden, head, targets, suppressed = scored(tokens, size, vocabulary)
    hidden, head = (x.detach().to(dtype).requires_grad_() for x in (hidden, head))

    def work():
        log_probs(hidden, head, targets, 1.0, suppressed)[0].sum().backward()

    results = (2 * hidden.numel() + 3 * head.numel() + 4 * tokens) * 4  # gradients, and the log-probabilities
    share = (peak_memory(work) - results) / (tokens * vocabulary * 4)
    what = f"memory of log-probabilities beyond inputs and gradients, of tokens × vocabulary, {dtype}"
    report(record_property, what, share)
    assert share < 0.02


class Device(TorchDispatchMode):
    """Watches operators on the meta device, which has a GPU's branches of the code: memory in use, and products."""

    def __init__(self):
        super().__init__()
        self.alive: dict[int, tuple] = {}  # by storage: a weak reference, and its bytes
        self.most = 0
        self.products: list[tuple] = []  # (rows, type of the result) of each product with the head

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if torch.is_tensor(x) and x.device.type == "meta":
                storage = x.untyped_storage()
                self.alive[storage._cdata] = weakref.ref(storage), storage.nbytes()
        self.alive = {key: (kept, size) for key, (kept, size) in self.alive.items() if kept() is not None}
        self.most = max(self.most, sum(size for _, size in self.alive.values()))
        if func._schema.name == "aten::mm":
            self.products.append((tuple(result.shape), result.dtype))
        return result


def scored_on_a_gpu(tokens: int, dtype: torch.dtype) -> Device:
    """Log-probabilities and gradient of a 7B model's head, as a GPU would run them."""
    size, vocabulary = 3584, 152064
    with torch.device("meta"):
        hidden = torch.empty(tokens, size, dtype=dtype, requires_grad=True)
        head = torch.empty(vocabulary, size, dtype=dtype, requires_grad=True)
        targets, suppressed = torch.empty(tokens, dtype=torch.long), torch.empty(vocabulary, dtype=torch.bool)
    with Device() as device:
        log_probs(hidden, head, targets, 0.7, suppressed)[0].sum().backward()
    device.results = 2 * hidden.nbytes + vocabulary * size * (4 + 2 * dtype.itemsize)
    return device


def test_logits_on_a_gpu_are_rounded_to_half_precision():
    """Between 16 and 32 bfloat16 has steps of an eighth: sampler and trainer would differ by .12 nats."""
    device = scored_on_a_gpu(3000, torch.bfloat16)
    found = {dtype for shape, dtype in device.products if shape[1] == 152064}
    assert found == {torch.float32}
    assert torch.float32 == logits(*(torch.empty(4, 8, device="meta").bfloat16() for _ in "hw")).dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_head_is_read_for_a_few_rows_or_its_tile_takes_gigabytes(dtype, record_property):
    """On a GPU: a thousand rows a product in half precision, and a gibibyte at most beside inputs and gradients."""
    device = scored_on_a_gpu(8192, dtype)
    rows = max(shape[0] for shape, _ in device.products if shape[1] == 152064)
    beside = (device.most - device.results) / 2**30
    report(record_property, f"GiB of a tile of {rows} rows, {dtype}", beside)
    assert rows >= (1000 if dtype == torch.bfloat16 else 700)
    assert beside < 1.02
