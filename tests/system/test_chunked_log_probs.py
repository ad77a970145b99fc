"""Log-probabilities in chunks of rows: the plain form's numbers and gradients, in less memory."""

from __future__ import annotations

import weakref
from functools import partial

import pytest
import torch
from helpers import report
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmsr.model import log_probs, logits
from mmsr.system import chunked_log_probs as chunked_module
from mmsr.system.chunked_log_probs import chunked_log_probs

chunked = partial(chunked_log_probs, logits)
CHUNK = "mmsr.system.chunked_log_probs.CHUNK_LOGITS"


def scored(rows: int = 11, size: int = 8, vocabulary: int = 30):
    torch.manual_seed(0)
    hidden = torch.randn(rows, size, requires_grad=True)
    head = torch.randn(vocabulary, size, requires_grad=True)
    suppressed = torch.zeros(vocabulary, dtype=torch.bool)
    suppressed[:4] = True
    return hidden, head, torch.randint(4, vocabulary, (rows,)), suppressed


def values_and_gradients(function):
    hidden, head, targets, suppressed = scored()
    logps, entropy = function(hidden, head, targets, 0.7, suppressed)
    return [logps, entropy, *torch.autograd.grad(logps.square().sum(), (hidden, head))]


def test_one_chunk_has_other_bits_than_the_plain_form():
    for ours, plain in zip(values_and_gradients(chunked), values_and_gradients(log_probs)):
        assert torch.equal(ours, plain)


@pytest.mark.parametrize("rows", [1, 4, 11])
def test_chunks_differ_from_the_plain_form(rows, monkeypatch):
    monkeypatch.setattr(CHUNK, rows * 30)
    for ours, plain in zip(values_and_gradients(chunked), values_and_gradients(log_probs)):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=5e-5)  # sums of 11 squares of around 10, in fp32


@pytest.mark.parametrize("rows", [1, 4, 11, 100])
def test_chunks_change_log_probabilities(rows, monkeypatch):
    hidden, head, targets, suppressed = scored()
    monkeypatch.setattr(CHUNK, rows * len(head))
    logps, entropy = chunked(hidden, head, targets, 0.7, suppressed)
    wanted = torch.distributions.Categorical(logits=(hidden @ head[4:].T) / 0.7)
    torch.testing.assert_close(logps, wanted.log_prob(targets - 4))
    torch.testing.assert_close(entropy, wanted.entropy())
    ours = torch.autograd.grad(logps.square().sum(), (hidden, head))
    for a, b in zip(ours, torch.autograd.grad(wanted.log_prob(targets - 4).square().sum(), (hidden, head))):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=5e-5)  # sums of 11 squares of around 10, in fp32


@pytest.mark.parametrize("function", [log_probs, chunked], ids=["plain", "chunked"])
def test_a_banned_token_makes_entropy_nan_or_keeps_probability(function):
    hidden, head, targets, suppressed = scored()
    suppressed[5:] = True  # one token is left, its probability 1
    logps, entropy = function(hidden, head, torch.full_like(targets, 4), suppressed=suppressed)
    assert torch.equal(entropy, torch.zeros(11)) and not entropy.requires_grad
    logps.sum().backward()
    assert hidden.grad.isfinite().all() and logits(hidden, head, 1.0, suppressed).softmax(-1)[:, suppressed].max() == 0


def test_no_rows_to_score_raise():
    hidden, head, targets, _ = scored(rows=0)
    logps, entropy = chunked(hidden, head, targets)
    assert logps.shape == entropy.shape == (0,)


def test_half_precision_gives_half_precision_log_probabilities():
    hidden, head, targets, _ = scored()
    logps, entropy = chunked(hidden.bfloat16(), head.bfloat16(), targets)
    assert logps.dtype == entropy.dtype == torch.float32


def test_head_gradient_of_half_precision_is_added_up_in_half_precision(monkeypatch, record_property):
    """Against fp32; autograd would add the chunks' shares up in bfloat16."""
    monkeypatch.setattr(CHUNK, 4 * 30)
    hidden, head, targets, suppressed = (x.detach() for x in scored(rows=800))
    exact = head.bfloat16().float().requires_grad_()
    chunked(hidden.bfloat16().float(), exact, targets, 1.0, suppressed)[0].sum().backward()
    half = head.bfloat16().requires_grad_()
    chunked(hidden.bfloat16(), half, targets, 1.0, suppressed)[0].sum().backward()
    error = ((half.grad.float() - exact.grad).norm() / exact.grad.norm()).item()
    report(record_property, "bf16 gradient of the head from 200 chunks, relative error", error)
    assert error < 5e-3


@pytest.mark.parametrize("rows", [4, 11])
def test_a_frozen_head_costs_a_gradient_or_changes_the_others(rows, monkeypatch):
    """Its gradient is a matrix as large as the head, in fp32, for every micro-batch."""
    monkeypatch.setattr(CHUNK, rows * 30)
    gradients = {}
    for trained in (True, False):
        hidden, head, targets, suppressed = scored()
        head.requires_grad_(trained)
        with Shapes() as made:
            chunked(hidden, head, targets, 0.7, suppressed)[0].square().sum().backward()
        gradients[trained] = hidden.grad
        assert (tuple(head.shape) in made.shapes) == trained and (head.grad is None) != trained
    assert torch.equal(gradients[True], gradients[False])


def test_a_head_alone_cannot_be_trained():
    hidden, head, targets, suppressed = scored()
    (wanted,) = torch.autograd.grad(chunked(hidden, head, targets, 0.7, suppressed)[0].sum(), head)
    (alone,) = torch.autograd.grad(chunked(hidden.detach(), head, targets, 0.7, suppressed)[0].sum(), head)
    assert torch.equal(wanted, alone)


class Shapes(TorchDispatchMode):
    """Notes the shapes of all new tensors."""

    def __init__(self):
        super().__init__()
        self.shapes: set[tuple] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func._schema.name in ("aten::zeros_like", "aten::mm"):
            self.shapes.add(tuple(result.shape))
        return result


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


@pytest.mark.first_is_quick
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_logits_are_in_memory_at_once(dtype, monkeypatch, record_property):
    """A pack of 16,384 trained tokens with a 64th of the real vocabulary, and of the chunk: forward and backward."""
    tokens, vocabulary, size = 16384, 152064 // 64, 16
    monkeypatch.setattr(CHUNK, chunked_module.CHUNK_LOGITS // 64)
    hidden, head, targets, suppressed = scored(tokens, size, vocabulary)
    hidden, head = (x.detach().to(dtype).requires_grad_() for x in (hidden, head))

    def work():
        chunked(hidden, head, targets, 1.0, suppressed)[0].sum().backward()

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
        chunked(hidden, head, targets, 0.7, suppressed)[0].sum().backward()
    device.results = 2 * hidden.nbytes + vocabulary * size * (4 + 2 * dtype.itemsize)
    return device


def test_logits_on_a_gpu_are_rounded_to_half_precision():
    """Between 16 and 32 bfloat16 has steps of an eighth: sampler and trainer would differ by .12 nats."""
    device = scored_on_a_gpu(3000, torch.bfloat16)
    found = {dtype for shape, dtype in device.products if shape[1] == 152064}
    assert found == {torch.float32}
    assert torch.float32 == logits(*(torch.empty(4, 8, device="meta").bfloat16() for _ in "hw")).dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_head_is_read_for_a_few_rows_or_its_chunk_takes_gigabytes(dtype, record_property):
    """On a GPU: a thousand rows a product in half precision, and a gibibyte at most beside inputs and gradients."""
    device = scored_on_a_gpu(8192, dtype)
    rows = max(shape[0] for shape, _ in device.products if shape[1] == 152064)
    beside = (device.most - device.results) / 2**30
    report(record_property, f"GiB of a chunk of {rows} rows, {dtype}", beside)
    assert rows >= (1000 if dtype == torch.bfloat16 else 700)
    assert beside < 1.02
