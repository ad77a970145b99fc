"""Packed attention against a plain per-segment softmax."""

from __future__ import annotations

import pytest
import torch
from helpers import largest_difference, report

from mmsr import attention
from mmsr.attention import Packed, Segments, SharedPrefix, packed_attention

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
    members = [*range(7)], [0, 1, 2, 3, 7], [0, 1, 2, 3, 8, 9, 10], [*range(11, 18)]  # positions, prompt first
    worst = 0.0
    for rows in members:
        alone = Packed([len(rows)], "cpu")(0, q[rows], k[rows], v[rows])
        worst = max(worst, largest_difference(shared[rows], alone))
    report(record_property, "shared against repeated prompt, attention", worst)
    assert worst < 1e-6


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
