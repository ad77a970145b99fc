"""Packed attention against a plain per-segment softmax."""

from __future__ import annotations

import pytest
import torch
from helpers import each_family, largest_difference, report, tiny_model
from test_engine import groups, run, texts

from mmsr import attention
from mmsr.attention import Cached, Packed, Segments, SharedPrefix, decode_attention_plain, packed_attention

LAYOUTS = {
    "different lengths": ((5, 1, 7, 3), (5, 1, 7, 3)),
    "equal lengths": ((4, 4, 4), (4, 4, 4)),
    "prefix before every segment": ((2, 1, 3), (6, 9, 3)),
    "alike segments apart": ((2, 5, 2, 5), (6, 5, 6, 5)),
}


def naive(q, k, v, q_lens, k_lens, causal):
    """One segment at a time, keys repeated per head, the mask written out."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    outs = []
    for q_one, k_one, v_one in zip(q.split(q_lens), k.split(k_lens), v.split(k_lens)):
        scores = torch.einsum("nhd,mhd->hnm", q_one, k_one) * q.shape[-1] ** -0.5
        if causal:
            unseen = torch.ones(len(q_one), len(k_one), dtype=torch.bool).triu(1 + len(k_one) - len(q_one))
            scores = scores.masked_fill(unseen.to(q.device), -torch.inf)
        outs.append(torch.einsum("hnm,mhd->nhd", scores.softmax(-1), v_one))
    return torch.cat(outs)


def tensors(q_lens, k_lens, heads, kv_heads, size=8, device="cpu", dtype=torch.float32):
    torch.manual_seed(0)
    shapes = ((sum(q_lens), heads, size), (sum(k_lens), kv_heads, size), (sum(k_lens), kv_heads, size))
    return [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for shape in shapes]


def with_gradients(out, inputs):
    weights = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out)
    return [out, *torch.autograd.grad((out * weights).sum(), inputs)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (6, 2)])
def test_a_segment_sees_the_wrong_keys(layout, causal, heads, kv_heads):
    q_lens, k_lens = LAYOUTS[layout]
    inputs = tensors(q_lens, k_lens, heads, kv_heads)
    ours = with_gradients(packed_attention(*inputs, Segments.of(q_lens, k_lens, causal, "cpu")), inputs)
    wanted = with_gradients(naive(*inputs, q_lens, k_lens, causal), inputs)
    for a, b in zip(ours, wanted):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_shared_prompt_differs_from_repeated_prompt(record_property):
    groups = [(4, [3, 1, 3]), (2, [5])]
    q, k, v = tensors((4, 3, 1, 3, 2, 5), (4, 3, 1, 3, 2, 5), 4, 2)
    shared = SharedPrefix(groups, "cpu")(0, q, k, v)
    sequences = [*range(7)], [0, 1, 2, 3, 7], [0, 1, 2, 3, 8, 9, 10], [*range(11, 18)]  # positions, prompt first
    worst = 0.0
    for rows in sequences:
        alone = Packed([len(rows)], "cpu")(0, q[rows], k[rows], v[rows])
        worst = max(worst, largest_difference(shared[rows], alone))
    report(record_property, "shared against repeated prompt, attention", worst)
    assert worst < 1e-6


def flash_forward(q, k, v, cum_q, cum_k, max_q, max_k, dropout, causal, debug, *, seqused_k):
    """torch's FlashAttention kernel on packed queries, as its documentation has it; of no keys it gives what FA 2 does.

    q (queries, H, D); k and v (places, H, D), of which sequence b has the first seqused_k[b] behind cum_k[b].
    """
    assert not dropout and not causal and {x.dtype for x in (cum_q, cum_k, seqused_k)} == {torch.int32}
    assert len(cum_q) == len(cum_k) == len(seqused_k) + 1
    assert cum_q[-1] == len(q) and cum_k[-1] <= len(k), "queries behind the last sequence come back as garbage"
    out, log_mass = torch.empty_like(q), torch.empty(q.shape[1], len(q))
    for b, keys in enumerate(seqused_k.tolist()):
        mine, first = slice(cum_q[b], cum_q[b + 1]), int(cum_k[b])
        assert mine.stop - mine.start <= max_q and keys <= max_k and first + keys <= cum_k[b + 1]
        scores = torch.einsum("qhd,khd->hqk", q[mine].float(), k[first : first + keys].float()) * q.shape[-1] ** -0.5
        out[mine] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[first : first + keys].float()).to(q.dtype)
        log_mass[:, mine] = scores.logsumexp(-1) if keys else torch.inf
    return out, log_mass, None, None, None


@pytest.fixture
def kernel(monkeypatch):
    """Decode steps attend by the kernel, played on the CPU."""
    monkeypatch.setattr(attention, "FLASH_FORWARD", flash_forward)
    monkeypatch.setattr(attention, "has_decode_kernel", lambda x: True)


class DecodeStep:
    """Two prompts in three rows, four sequences in six slots. What is beyond a length is random."""

    def __init__(self, heads=6, kv_heads=2, size=8):
        torch.manual_seed(1)
        self.q = torch.randn(6, heads, size)
        self.prefix = tuple(torch.randn(3, 7, kv_heads, size) for _ in "kv")
        self.suffix = tuple(torch.randn(6, 5, kv_heads, size) for _ in "kv")
        self.prefix_lens = torch.tensor([7, 0, 3])
        self.suffix_lens = torch.tensor([1, 5, 2, 1, 3, 1])
        self.group_slots = torch.tensor([[1, 3], [0, 0], [4, 2]])  # slots 0 and 5 are empty
        self.slot_mapping = torch.tensor([0, 0, 5, 1, 4, 0])
        self.rows = {1: 0, 2: 2, 3: 0, 4: 2}  # of the slots that are not empty

    def layout(self, device="cpu") -> Cached:
        return Cached(
            self.prefix_lens.to(device),
            self.group_slots.to(device),
            self.slot_mapping.to(device),
            self.suffix_lens.to(device),
        )

    def wanted(self) -> torch.Tensor:
        """Slot by slot, prompt and own tokens in one softmax."""
        outs = []
        for slot, row in self.rows.items():
            packed = []
            for prefix, suffix in zip(self.prefix, self.suffix):
                prompt = prefix[row, : self.prefix_lens[row]]
                own = suffix[slot, : self.suffix_lens[slot]]
                packed.append(torch.cat([prompt, own]))
            keys, values = packed
            outs.append(naive(self.q[slot : slot + 1], keys, values, (1,), (len(keys),), False))
        return torch.cat(outs)

    def forget(self) -> None:
        """Make what is beyond a length not a number."""
        for stores, lens in ((self.prefix, self.prefix_lens), (self.suffix, self.suffix_lens)):
            for store in stores:
                store[torch.arange(store.shape[1]) >= lens[:, None]] = torch.nan


@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (6, 2)])
def test_a_decode_step_sees_the_wrong_keys(heads, kv_heads):
    step = DecodeStep(heads, kv_heads)
    ours = step.layout()(step.q, step.prefix, step.suffix)
    torch.testing.assert_close(ours[1:5], step.wanted())
    assert ours.isfinite().all(), "an empty slot's keys are written to the cache"


@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (6, 2)])
def test_a_decode_step_differs_from_its_plain_loop(heads, kv_heads):
    step = DecodeStep(heads, kv_heads)
    layout = step.layout()
    plain = decode_attention_plain(layout, step.q, step.prefix, step.suffix)
    torch.testing.assert_close(layout(step.q, step.prefix, step.suffix)[1:5], plain[1:5])
    torch.testing.assert_close(plain[1:5], step.wanted())


@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (6, 2)])
def test_the_kernels_decode_step_sees_the_wrong_keys(heads, kv_heads, kernel):
    """Two calls and a merge; the kernel reads no key beyond a length, and no sequence sees the row without a prompt."""
    step = DecodeStep(heads, kv_heads)
    wanted = step.wanted()
    step.forget()
    ours = step.layout()(step.q, step.prefix, step.suffix)
    torch.testing.assert_close(ours[1:5], wanted)
    assert ours.isfinite().all(), "an empty slot's keys are written to the cache"


@each_family
def test_tokens_drawn_by_the_decode_kernel_are_others(kernel, monkeypatch):
    """A whole engine on it: rows and slots that come and go, and the cache as the kernel wants it."""
    model = tiny_model(4)
    with torch.no_grad():
        model.lm_head.weight.mul_(4)
    by_kernel, plain = groups(6, 3), groups(6, 3)
    run(model, by_kernel, slots=7)
    monkeypatch.undo()
    run(model, plain, slots=7)
    assert texts(by_kernel) == texts(plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_torch_has_another_kernel_than_the_one_played_here(dtype):
    """Its real operator takes these arguments and gives these shapes, on the meta device."""
    step = DecodeStep(6, 2, 64)
    q = step.q.to("meta", dtype).view(3, 4, 3, 64)[:, :, :2]
    k, v = (x.to("meta", dtype) for x in step.prefix)
    lens = attention.Lengths(step.prefix_lens.to("meta"))
    out, log_mass = attention._kernel_part(q, k, v, lens)
    assert out.shape == (3, 4, 2, 64) and out.dtype == dtype
    assert log_mass.shape == (3, 4, 2) and log_mass.dtype == torch.float32


def test_half_precision_on_the_cpu_is_sent_to_a_cuda_kernel():
    assert attention.backend(torch.zeros(1, 1, 8, dtype=torch.bfloat16)) == "sdpa"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kernel", ["flash", "varlen", "sdpa"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (6, 2)])
def test_a_cuda_kernel_departs_from_fp32(kernel, layout, causal, heads, kv_heads):
    if {"flash": attention.FLASH_ATTN, "varlen": attention.TORCH_VARLEN, "sdpa": True}[kernel] is None:
        pytest.skip(f"{kernel} is not installed")
    q_lens, k_lens = LAYOUTS[layout]
    inputs = tensors(q_lens, k_lens, heads, kv_heads, 64, "cuda", torch.bfloat16)
    exact = [x.detach().float().requires_grad_() for x in inputs]
    ours = with_gradients(packed_attention(*inputs, Segments.of(q_lens, k_lens, causal, "cuda"), kernel), inputs)
    wanted = with_gradients(naive(*exact, q_lens, k_lens, causal), exact)
    for a, b in zip(ours, wanted):
        torch.testing.assert_close(a.float(), b, rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (6, 2), (28, 4)])
def test_cudas_decode_kernel_departs_from_the_plain_step(heads, kv_heads):
    """The real kernel in half precision against the plain step in fp32; what is beyond a length is not a number."""
    step = DecodeStep(heads, kv_heads, 64)
    wanted = step.wanted()
    step.forget()
    q = step.q.to("cuda", torch.bfloat16)
    prefix = tuple(x.to("cuda", torch.bfloat16) for x in step.prefix)
    suffix = tuple(x.to("cuda", torch.bfloat16) for x in step.suffix)
    assert attention.has_decode_kernel(q)
    ours = step.layout("cuda")(q, prefix, suffix).float().cpu()
    torch.testing.assert_close(ours[1:5], wanted, rtol=2e-2, atol=2e-2)
    assert ours.isfinite().all()
