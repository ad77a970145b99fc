"""Attention over packed sequences: one function, and the layouts that say which query sees which keys.

Nothing here is padded. Sequences follow one another along a single token axis. A *segment* is a run of queries with the
keys that they see: the `q_lens[i]` queries of segment i attend to its `k_lens[i]` keys and to no others. Causal
segments are aligned at the end: the last query sees every key, the query before it all keys but one, and so on.

    q_lens 3, k_lens 3: ordinary attention        q_lens 2, k_lens 5: three keys of a prefix in front

              keys                                          keys
    queries   x . .                               queries   x x x x .
              x x .                                         x x x x x
              x x x

There are three layouts:

    Packed         whole sequences, each sees itself: the plain form, which examples/plain_grpo.py uses
    SharedPrefix   training: the completions of a group see its prompt, which is there once
    Cached         generation: each sequence has one new query, and the keys of its past are in a cache

The last two give the values of the first without computing a prompt or a past token twice.

Shape letters: N packed queries, M packed keys, H query heads, K key/value heads, D head size.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from dataclasses import dataclass
from typing import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from mmsr.system.fuse import fused

# What a transformer block calls: (layer index, q (N, H, D), k (N, K, D), v (N, K, D)) -> (N, H, D).
AttentionFn = Callable[[int, Tensor, Tensor, Tensor], Tensor]


# ---- packed sequences


@dataclass(frozen=True)
class Segments:
    """Lengths of the segments of one packed call, and the running sums that the kernels want.

    Two sequences of 3 and 2 tokens, each of which sees itself: q_lens = k_lens = (3, 2), cu_q = cu_k = [0, 3, 5].
    Where the second has 4 cached tokens in front: k_lens = (3, 6), cu_k = [0, 3, 9].
    """

    q_lens: tuple[int, ...]
    k_lens: tuple[int, ...]
    causal: bool
    cu_q: Tensor  # (segments + 1,) int32, cumulated: where each segment's queries start, and the end
    cu_k: Tensor  # (segments + 1,) int32: the same for its keys

    @classmethod
    def of(cls, q_lens: Sequence[int], k_lens: Sequence[int], causal: bool, device) -> Segments:
        cu_q = torch.tensor([0, *q_lens], device=device).cumsum(0).int()
        cu_k = torch.tensor([0, *k_lens], device=device).cumsum(0).int()
        return cls(tuple(q_lens), tuple(k_lens), causal, cu_q, cu_k)


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    kernel: str | None = None,
) -> Tensor:
    """softmax(q kᵀ / √D) v within each segment: q (N, H, D), k and v (M, K, D), H a multiple of K → (N, H, D).

    Without `kernel`, the fastest that serves `q`.
    """
    kernel = kernel or backend(q)
    if kernel == "sdpa":
        return _sdpa(q, k, v, segments)
    longest_q = max(segments.q_lens)
    longest_k = max(segments.k_lens)
    sizes = (segments.cu_q, segments.cu_k, longest_q, longest_k)
    if kernel == "flash":
        return FLASH_ATTN(q, k, v, *sizes, causal=segments.causal)
    return _varlen(q, k, v, sizes, segments.causal)


class Packed:
    """The layout of whole sequences: each sees itself, causally. A layout is called as an `AttentionFn`."""

    def __init__(self, lens: Sequence[int], device):
        self.segments = Segments.of(lens, lens, True, device)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return packed_attention(q, k, v, self.segments)


class SharedPrefix:
    """The layout of groups of completions that share a prompt, which is packed once:

        packed tokens   | prompt A | A's 1st | A's 2nd | prompt B | B's 1st | …

        segment         queries    keys, repeated by `gather`
        0               prompt A   prompt A
        1               A's 1st    prompt A, A's 1st
        2               A's 2nd    prompt A, A's 2nd
        3               prompt B   prompt B
        4               B's 1st    prompt B, B's 1st

    So linear layers see every prompt token once. Only inside attention are the prompt's keys repeated. `gather` is a
    plain index: autograd adds up what the repeated keys get, and activation checkpointing needs no special case.
    """

    def __init__(self, groups: Sequence[tuple[int, Sequence[int]]], device):
        """`groups`: (prompt length, [completion lengths]) in packed order; no completion may be empty."""
        q_lens = []
        k_lens = []
        gather = []  # for each segment, where its keys are among the packed tokens
        start = 0
        for prompt_len, completion_lens in groups:
            prompt = torch.arange(start, start + prompt_len)
            start += prompt_len
            q_lens.append(prompt_len)
            k_lens.append(prompt_len)
            gather.append(prompt)
            for length in completion_lens:
                completion = torch.arange(start, start + length)
                start += length
                q_lens.append(length)
                k_lens.append(prompt_len + length)
                gather += [prompt, completion]
        self.segments = Segments.of(q_lens, k_lens, True, device)
        self.gather = torch.cat(gather).to(device)  # (M,)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k = k[self.gather]  # (M, K, D)
        v = v[self.gather]  # (M, K, D)
        return packed_attention(q, k, v, self.segments)


# ---- a decode step
#
# The cache has R rows, one prompt each, with room for P tokens, and S slots, one sequence each, with room for L tokens.
# A prompt has at most G sequences. What treats rows and slots alike calls them B sequences with Q queries each.

KeysAndValues = tuple[Tensor, Tensor]


def decode_attention_plain(
    layout: Cached,
    q: Tensor,
    prefix: KeysAndValues,
    suffix: KeysAndValues,
) -> Tensor:
    """What `Cached` computes, slot by slot: one softmax over [the keys of its prompt; its own keys].

    Nothing calls this but a test, which holds the fast form against it. Arguments and result are those of `Cached`.
    """
    prefix_k, prefix_v = prefix
    suffix_k, suffix_v = suffix
    group_size = layout.group_slots.shape[1]  # G
    queries_per_key = q.shape[1] // suffix_k.shape[2]  # H / K
    scale = q.shape[-1] ** -0.5  # 1 / √D
    outs = []
    for slot in range(len(q)):
        row = layout.slot_mapping[slot] // group_size
        prompt_len = layout.prefix.tokens[row]
        own_len = layout.suffix.tokens[slot]
        k = torch.cat([prefix_k[row, :prompt_len], suffix_k[slot, :own_len]])  # (M, K, D)
        v = torch.cat([prefix_v[row, :prompt_len], suffix_v[slot, :own_len]])  # (M, K, D)
        k = k.repeat_interleave(queries_per_key, 1)  # (M, H, D)
        v = v.repeat_interleave(queries_per_key, 1)  # (M, H, D)
        scores = torch.einsum("hd,mhd->hm", q[slot], k) * scale  # (H, M)
        weights = scores.softmax(-1)  # (H, M)
        out = torch.einsum("hm,mhd->hd", weights, v)  # (H, D)
        outs.append(out)
    return torch.stack(outs)  # (S, H, D)


class Cached:
    """The layout of a decode step: each slot has one query, which sees [the prompt of its group; its own tokens].

    `decode_attention_plain` is the definition. It reads the prompt once for every sequence of the group. Here all
    queries of a group are multiplied with their prompt's keys at once, so the prompt is read once for the group. Each
    query is multiplied with its own keys separately, and the two results are merged. With the scores s_j = q · k_j / √D
    and the sums Z_i of exp(s_j) over the keys of part i (1 the prompt, 2 the slot), each part gives

        out_i = Σ_{j in part i} exp(s_j) v_j / Z_i,     so     Σ_{j in part i} exp(s_j) v_j = Z_i out_i

    and the softmax over all keys is exactly

        out = Σ_j exp(s_j) v_j / Σ_j exp(s_j) = (Z_1 out_1 + Z_2 out_2) / (Z_1 + Z_2)

    No gradient: this is for sampling.
    """

    def __init__(
        self,
        prefix_lens: Tensor,
        group_slots: Tensor,
        slot_mapping: Tensor,
        suffix_lens: Tensor,
    ):
        """Who shares which prompt, and how long everything is.

        `prefix_lens` (R,): tokens of each row's prompt. `suffix_lens` (S,): tokens of each slot, the new one included.
        `group_slots` (R, G): the slots of each prompt's sequences; any slot where a prompt has fewer than G.
        `slot_mapping` (S,): where each slot is found in `group_slots`, as a flat index: row * G + column.

        Where slots 0, 1 and 3 have the prompt of row 0, and slot 2 that of row 1:
        `group_slots` [[0, 1, 3], [2, 0, 0]], `slot_mapping` [0, 1, 3, 2].
        """
        self.prefix = Lengths(prefix_lens)
        self.suffix = Lengths(suffix_lens)
        self.group_slots = group_slots
        self.slot_mapping = slot_mapping

    def __call__(self, q: Tensor, prefix: KeysAndValues, suffix: KeysAndValues) -> Tensor:
        """q (S, H, D); `prefix`: keys and values (R, P, K, D); `suffix`: keys and values (S, L, K, D) → (S, H, D)."""
        if has_decode_kernel(q):
            attend = _kernel_part
            merge = _merge_kernel_parts
        else:
            attend = _plain_part
            merge = _merge_plain_parts
        kv_heads = suffix[0].shape[2]  # K
        group_size = self.group_slots.shape[1]  # G
        # The H/K query heads that share a key head become queries of that head, beside those of the other sequences.
        heads = q.unflatten(1, (kv_heads, -1))  # (S, K, H/K, D)
        heads = heads.transpose(1, 2).contiguous()  # (S, H/K, K, D)
        by_prompt = heads[self.group_slots]  # (R, G, H/K, K, D)
        by_prompt = by_prompt.flatten(1, 2)  # (R, G * H/K, K, D)
        on_prefix = []
        for part in attend(by_prompt, *prefix, self.prefix):  # (R, G * H/K, K, …) each
            part = part.unflatten(1, (group_size, -1))  # (R, G, H/K, K, …)
            on_prefix.append(part.flatten(0, 1))  # (R * G, H/K, K, …)
        on_suffix = attend(heads, *suffix, self.suffix)  # (S, H/K, K, …) each
        return merge(self.slot_mapping, *on_prefix, *on_suffix).to(q.dtype)


class Lengths:
    """How many keys each of B sequences has, and what the kernel wants to know of it, computed once for all layers."""

    def __init__(self, tokens: Tensor):
        self.tokens = tokens  # (B,)
        self.int32 = tokens.int()  # (B,)
        self.index = torch.arange(len(tokens) + 1, device=tokens.device, dtype=torch.int32)  # (B + 1,)
        self.known: dict[int, Tensor] = {}  # room -> `starts`

    def starts(self, room: int) -> Tensor:
        """Where each sequence begins, and the end, (B + 1,) int32, where every sequence takes `room` tokens."""
        if room not in self.known:
            self.known[room] = self.index * room
        return self.known[room]


def _kernel_part(q: Tensor, k: Tensor, v: Tensor, lens: Lengths) -> tuple[Tensor, Tensor]:
    """Attention of q (B, Q, K, D) to the first `lens` of the keys and values (B, L, K, D), P for L in a row.

    Returns out_i (B, Q, K, D) and log Z_i (B, Q, K), fp32.
    """
    batch, queries, _, _ = q.shape
    room = k.shape[1]
    out, log_mass, *_ = FLASH_FORWARD(
        q.flatten(0, 1),  # (B * Q, K, D)
        k.flatten(0, 1),  # (B * L, K, D)
        v.flatten(0, 1),  # (B * L, K, D)
        lens.starts(queries),
        lens.starts(room),
        queries,  # the most of a sequence
        room,  # the most of a sequence
        0.0,  # dropout
        False,  # causal
        False,  # return the debug mask
        seqused_k=lens.int32,
    )
    out = out.unflatten(0, (batch, queries))  # (B, Q, K, D)
    log_mass = log_mass.T.unflatten(0, (batch, queries))  # (B, Q, K), of (K, B * Q)
    return out, log_mass


@fused
def _merge_kernel_parts(
    slot_mapping: Tensor,
    out_1: Tensor,
    log_mass_1: Tensor,
    out_2: Tensor,
    log_mass_2: Tensor,
) -> Tensor:
    """Both parts (…, H/K, K, D) merged, (S, H, D). `slot_mapping` (S,): where a slot is in the first part.

    Z_2 / (Z_1 + Z_2) = sigmoid(log Z_2 − log Z_1).
    """
    out_1 = out_1[slot_mapping]  # (S, H/K, K, D)
    log_mass_1 = log_mass_1[slot_mapping]  # (S, H/K, K)
    share_2 = (log_mass_2 - log_mass_1).sigmoid()[..., None]  # (S, H/K, K, 1)
    out = out_1 * (1 - share_2) + out_2 * share_2  # (S, H/K, K, D)
    return out.to(out_2.dtype).transpose(1, 2).flatten(1, 2)


def _plain_part(q: Tensor, k: Tensor, v: Tensor, lens: Lengths) -> tuple[Tensor, Tensor, Tensor]:
    """The same as `_kernel_part` in plain operations, in fp32 or wider, before the division.

    Returns Σ w v (B, Q, K, D), Σ w (B, Q, K, 1) and m (B, Q, K, 1): m is the largest score and w = exp(score − m), so
    Z_i = exp(m) Σ w. Not log Z_i: near 30, an fp32 logarithm is ten times coarser than what it would scale.
    """
    wide = _sum_dtype(q)
    q = q.to(wide).transpose(1, 2)  # (B, K, Q, D)
    k = k.to(wide).transpose(1, 2)  # (B, K, L, D)
    v = v.to(wide).transpose(1, 2)  # (B, K, L, D)
    scale = q.shape[-1] ** -0.5  # 1 / √D
    scores = _product(q, k.transpose(2, 3)) * scale  # (B, K, Q, L)
    place = torch.arange(k.shape[2], device=k.device)  # (L,)
    unused = place >= lens.tokens[:, None]  # (B, L)
    scores.masked_fill_(unused[:, None, None], torch.finfo(torch.float32).min)
    top = scores.amax(-1, keepdim=True)  # (B, K, Q, 1)
    weights = (scores - top).exp()  # (B, K, Q, L)
    total = _product(weights.to(v.dtype), v)  # (B, K, Q, D)
    mass = weights.sum(-1, keepdim=True)  # (B, K, Q, 1)
    return tuple(part.transpose(1, 2) for part in (total, mass, top))


def _merge_plain_parts(
    slot_mapping: Tensor,
    total_1: Tensor,
    mass_1: Tensor,
    top_1: Tensor,
    total_2: Tensor,
    mass_2: Tensor,
    top_2: Tensor,
) -> Tensor:
    """Two `_plain_part`s merged, (S, H, D): both are brought to the same m, the larger one, and then divided."""
    total_1 = total_1[slot_mapping]  # (S, H/K, K, D)
    mass_1 = mass_1[slot_mapping]  # (S, H/K, K, 1)
    top_1 = top_1[slot_mapping]  # (S, H/K, K, 1)
    top = torch.maximum(top_1, top_2)  # (S, H/K, K, 1)
    scale_1 = (top_1 - top).exp()  # (S, H/K, K, 1)
    scale_2 = (top_2 - top).exp()  # (S, H/K, K, 1)
    total = scale_1 * total_1 + scale_2 * total_2  # (S, H/K, K, D)
    mass = scale_1 * mass_1 + scale_2 * mass_2  # (S, H/K, K, 1)
    out = total / mass
    return out.transpose(1, 2).flatten(1, 2)


# ---- kernels


try:
    from flash_attn import flash_attn_varlen_func as FLASH_ATTN
except ImportError:
    FLASH_ATTN = None
try:
    from torch.nn.attention.varlen import varlen_attn as TORCH_VARLEN
except ImportError:
    TORCH_VARLEN = None
# The operator behind torch.nn.attention.varlen. It can be given the number of keys in use (`seqused_k`); the Python
# function cannot before torch 2.12.
FLASH_FORWARD = torch.ops.aten._flash_attention_forward
# torch's own kernel has changed its keywords between releases, so ask it which it has.
VARLEN_OPTIONS = inspect.signature(TORCH_VARLEN).parameters if TORCH_VARLEN else {}


def backend(q: Tensor) -> str:
    """The kernel that serves `q`: "flash" (flash-attn) or "varlen" (torch) for half precision on CUDA, else "sdpa"."""
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        if FLASH_ATTN is not None:
            return "flash"
        if TORCH_VARLEN is not None:
            return "varlen"
    return "sdpa"


def has_decode_kernel(x: Tensor) -> bool:
    """Whether a decode step on tensors like `x` uses torch's FlashAttention kernel, which is given every length."""
    return backend(x) != "sdpa"


def _varlen(q: Tensor, k: Tensor, v: Tensor, sizes: tuple, causal: bool) -> Tensor:
    options = {}
    if "enable_gqa" in VARLEN_OPTIONS:  # releases without this option accept fewer key heads than query heads as it is
        options["enable_gqa"] = q.shape[1] != k.shape[1]
    if "window_size" in VARLEN_OPTIONS:
        options["window_size"] = (-1, 0) if causal else (-1, -1)
    else:
        options["is_causal"] = causal
    return TORCH_VARLEN(q, k, v, *sizes, **options)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """torch's scaled_dot_product_attention takes sequences of equal lengths: one call for each shape of segment."""
    same_shape = defaultdict(list)  # (q_len, k_len) -> indices of the segments
    for index, shape in enumerate(zip(segments.q_lens, segments.k_lens)):
        same_shape[shape].append(index)
    if len(same_shape) == 1:
        return _sdpa_batch(q, k, v, segments.q_lens[0], segments.k_lens[0], segments.causal)
    q_parts = q.split(segments.q_lens)
    k_parts = k.split(segments.k_lens)
    v_parts = v.split(segments.k_lens)
    outs = [None] * len(q_parts)
    for (q_len, k_len), indices in same_shape.items():
        q_batch = torch.cat([q_parts[i] for i in indices])  # (B * q_len, H, D)
        k_batch = torch.cat([k_parts[i] for i in indices])  # (B * k_len, K, D)
        v_batch = torch.cat([v_parts[i] for i in indices])  # (B * k_len, K, D)
        out_batch = _sdpa_batch(q_batch, k_batch, v_batch, q_len, k_len, segments.causal)  # (B * q_len, H, D)
        for index, out in zip(indices, out_batch.split(q_len)):
            outs[index] = out
    return torch.cat(outs)


def _sdpa_batch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_len: int,
    k_len: int,
    causal: bool,
) -> Tensor:
    """`packed_attention` of B segments of one shape: q (B * q_len, H, D), k and v (B * k_len, K, D)."""
    dtype = q.dtype
    wide = _sum_dtype(q)
    grouped = q.shape[1] != k.shape[1]  # several query heads share a key head
    q = q.to(wide).unflatten(0, (-1, q_len)).transpose(1, 2)  # (B, H, q_len, D)
    k = k.to(wide).unflatten(0, (-1, k_len)).transpose(1, 2)  # (B, K, k_len, D)
    v = v.to(wide).unflatten(0, (-1, k_len)).transpose(1, 2)  # (B, K, k_len, D)
    square = causal and q_len == k_len
    mask = None
    if causal and not square and q_len > 1:  # a single query sees every key
        mask = causal_lower_right(q_len, k_len)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=square, enable_gqa=grouped)
    return out.transpose(1, 2).flatten(0, 1).to(dtype)  # (B * q_len, H, D)


# ---- precision


# Whether attention of fp32 tensors on the CPU is summed in fp64 (--deterministic). Attention is the one place where the
# sampler with its cache and the trainer with its packs add the same numbers in different orders. Summed in fp64 and
# rounded once, it is equal in both to the bit, apart from rare ties. It takes two to three times as long.
_FP64 = False


def sum_in_fp64(on: bool) -> None:
    """From now on, sum fp32 attention on the CPU in fp64, or (`on` false) in fp32."""
    global _FP64
    _FP64 = on


def _sum_dtype(q: Tensor) -> torch.dtype:
    """The type that attention is summed in. On CUDA it is left to the kernel.

    On the CPU, half precision is summed in fp32: torch's kernel would round the attention weights in one way with a
    cache and in another way without, and that would be the whole gap between sampler and trainer there.
    """
    if q.is_cuda or q.dtype == torch.float64:
        return q.dtype
    if _FP64 and q.dtype == torch.float32:
        return torch.float64
    return torch.float32


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in fp32 or wider, of half-precision factors too: rounded scores would part sampler and trainer."""
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    out = torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out_dtype=torch.float32)
    return out.unflatten(0, a.shape[:2])
