"""Attention over packed sequences: one function, three kernels behind it, and the layouts built on it.

Nothing here is padded. Sequences lie one after another along a single token axis, and a *segment* says which queries
see which keys: segment i's `q_lens[i]` queries attend to its `k_lens[i]` keys, causally from the bottom right (the
last query sees every key). With q_lens == k_lens that is ordinary attention; with k_lens > q_lens the extra keys in
front are a prefix: a shared prompt in training, a cache in generation.

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


def _flash_attn():
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None
    return flash_attn_varlen_func


def _torch_varlen():
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


FLASH_ATTN = _flash_attn()
TORCH_VARLEN = _torch_varlen()
# What torch.nn.attention.varlen calls; for keys that are not all used, which it does not offer before torch 2.12.
FLASH_FORWARD = torch.ops.aten._flash_attention_forward
# torch's own kernel has changed its keywords between releases, so ask it which it has.
VARLEN_OPTIONS = frozenset(inspect.signature(TORCH_VARLEN).parameters) if TORCH_VARLEN else frozenset()


# Whether attention of fp32 tensors on the CPU is summed in fp64. Attention is the one place where the sampler with its
# cache and the trainer with its packs add the same numbers up in different orders. Summed widely and rounded once it is
# equal in both, to the bit but for rare ties, at two to three times its cost. For --deterministic.
_WIDE = False


def sum_widely(on: bool) -> None:
    """From now on, sum fp32 attention on the CPU in fp64, or (`on` false) in fp32."""
    global _WIDE
    _WIDE = on


def _sum_dtype(q: Tensor) -> torch.dtype:
    """What attention is summed in. Half precision is fp32 on the CPU, whose kernel would round attention's weights in
    one way with a cache and in another without: all of the gap between sampler and trainer there. CUDA is as it is.
    """
    if q.is_cuda or q.dtype == torch.float64:
        return q.dtype
    return torch.float64 if _WIDE and q.dtype == torch.float32 else torch.float32


def backend(q: Tensor) -> str:
    """The kernel that will serve `q`: "flash" (flash-attn) or "varlen" (torch) for CUDA half precision, else "sdpa"."""
    half = q.is_cuda and q.dtype in (torch.bfloat16, torch.float16)
    if half and FLASH_ATTN is not None:
        return "flash"
    return "varlen" if half and TORCH_VARLEN is not None else "sdpa"


@dataclass(frozen=True)
class Segments:
    """Lengths of the segments of one packed call, with what the kernels want derived once per layout."""

    q_lens: tuple[int, ...]
    k_lens: tuple[int, ...]
    causal: bool
    cu_q: Tensor  # (segments + 1,) int32, running sums
    cu_k: Tensor

    @classmethod
    def of(cls, q_lens: Sequence[int], k_lens: Sequence[int], causal: bool, device) -> Segments:
        def running(lens):
            return torch.tensor([0, *lens], device=device).cumsum(0).int()

        return cls(tuple(q_lens), tuple(k_lens), causal, running(q_lens), running(k_lens))


def packed_attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments, kernel: str | None = None) -> Tensor:
    """softmax(q kᵀ / √D) v within each segment: q (N, H, D), k and v (M, K, D), H a multiple of K → (N, H, D)."""
    kernel = kernel or backend(q)
    if kernel == "sdpa":
        return _sdpa(q, k, v, segments)
    sizes = (segments.cu_q, segments.cu_k, max(segments.q_lens), max(segments.k_lens))
    if kernel == "flash":
        return FLASH_ATTN(q, k, v, *sizes, causal=segments.causal)
    return _varlen(q, k, v, sizes, segments.causal)


def _varlen(q: Tensor, k: Tensor, v: Tensor, sizes: tuple, causal: bool) -> Tensor:
    options = {}
    if "enable_gqa" in VARLEN_OPTIONS:  # before that option the kernel took fewer key heads without being asked
        options["enable_gqa"] = q.shape[1] != k.shape[1]
    if "window_size" in VARLEN_OPTIONS:
        options["window_size"] = (-1, 0) if causal else (-1, -1)
    else:
        options["is_causal"] = causal
    return TORCH_VARLEN(q, k, v, *sizes, **options)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """Segments of equal shape stand as one batch, so the number of kernel calls is that of distinct shapes."""
    alike = defaultdict(list)
    for index, shape in enumerate(zip(segments.q_lens, segments.k_lens)):
        alike[shape].append(index)
    if len(alike) == 1:
        (shape,) = alike
        return _sdpa_batch(q, k, v, *shape, segments.causal)
    qs, ks, vs = q.split(segments.q_lens), k.split(segments.k_lens), v.split(segments.k_lens)
    out: list[Tensor] = [q] * len(qs)
    for (q_len, k_len), members in alike.items():
        parts = (torch.cat([pieces[i] for i in members]) for pieces in (qs, ks, vs))
        done = _sdpa_batch(*parts, q_len, k_len, segments.causal)
        for index, piece in zip(members, done.split(q_len)):
            out[index] = piece
    return torch.cat(out)


def _sdpa_batch(q: Tensor, k: Tensor, v: Tensor, q_len: int, k_len: int, causal: bool) -> Tensor:
    dtype, wide = q.dtype, _sum_dtype(q)
    q = q.to(wide).unflatten(0, (-1, q_len)).transpose(1, 2)  # (B, H, q_len, D)
    k, v = (x.to(wide).unflatten(0, (-1, k_len)).transpose(1, 2) for x in (k, v))
    square = causal and q_len == k_len
    mask = causal_lower_right(q_len, k_len) if causal and not square and q_len > 1 else None
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=square, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2).flatten(0, 1).to(dtype)


class Packed:
    """The layout of whole sequences: each sees itself, causally. Use as the `attention_fn` of a forward pass."""

    def __init__(self, lens: Sequence[int], device):
        self.segments = Segments.of(lens, lens, True, device)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return packed_attention(q, k, v, self.segments)


class SharedPrefix:
    """The layout of groups whose shared prompt stands once: [prompt, member, member, ..., prompt, member, ...].

    Linear layers see every prompt token once. Inside attention a member's queries attend to [prompt keys; own keys];
    the keys are repeated there by `gather`, a plain index, so the pass stays a pure function that autograd and
    activation checkpointing need not know anything about.
    """

    def __init__(self, groups: Sequence[tuple[int, Sequence[int]]], device):
        """`groups`: (prompt length, [member suffix lengths]) in packed order; a suffix may not be empty."""
        q_lens, k_lens, gather, start = [], [], [], 0
        for prompt, members in groups:
            prefix = torch.arange(start, start + prompt)
            q_lens.append(prompt), k_lens.append(prompt), gather.append(prefix)
            start += prompt
            for length in members:
                q_lens.append(length), k_lens.append(prompt + length)
                gather += [prefix, torch.arange(start, start + length)]
                start += length
        self.segments = Segments.of(q_lens, k_lens, True, device)
        self.gather = torch.cat(gather).to(device)  # (M,)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return packed_attention(q, k[self.gather], v[self.gather], self.segments)


class Cached:
    """The layout of a decode step: one query per slot over [the prompt that its group shares; its own tokens].

    The two parts are attended to apart, so that a prompt is read once for all of its members, and merged: with the
    softmax over a part's keys as out_i and Z_i the sum of that part's exponentials,

        out = (Z_1 out_1 + Z_2 out_2) / (Z_1 + Z_2)

    No gradient: this is for sampling. Shape letters: S slots, R prompts, G members of a prompt at most.
    """

    def __init__(self, prefix_lens: Tensor, members: Tensor, place: Tensor, suffix_lens: Tensor):
        """`prefix_lens` (R,): tokens of each prompt. `suffix_lens` (S,): tokens of each slot, the new one included.

        `members` (R, G): the slot of each member of a prompt, any slot where a prompt has fewer. `place` (S,): the flat
        index of each slot in `members`.
        """
        self.prefix, self.suffix = Lengths(prefix_lens), Lengths(suffix_lens)
        self.members, self.place = members, place

    def __call__(self, q: Tensor, prefix: tuple[Tensor, Tensor], suffix: tuple[Tensor, Tensor]) -> Tensor:
        """q (S, H, D); `prefix`: keys and values (R, P, K, D); `suffix`: keys and values (S, L, K, D) → (S, H, D)."""
        rows, group = self.members.shape
        attention_fn = _kernel_part if has_decode_kernel(q) else _plain_part
        merge = _merge_kernel_parts if has_decode_kernel(q) else _merge_plain_parts
        heads = q.unflatten(1, (suffix[0].shape[2], -1)).transpose(1, 2).contiguous()  # (S, H/K, K, D)
        shared = heads[self.members].flatten(1, 2)  # (R, G * H/K, K, D)
        on_prefix = attention_fn(shared, *prefix, self.prefix)
        on_prefix = [x.unflatten(1, (group, -1)).flatten(0, 1) for x in on_prefix]  # (R * G, H/K, K, …)
        on_suffix = attention_fn(heads, *suffix, self.suffix)  # (S, H/K, K, …)
        return merge(self.place, *on_prefix, *on_suffix).to(q.dtype)


class Lengths:
    """How many keys each sequence has (B,), and what the kernel wants made of it, once for all layers."""

    def __init__(self, tokens: Tensor):
        self.tokens, self.int32 = tokens, tokens.int()
        self.count = torch.arange(len(tokens) + 1, device=tokens.device, dtype=torch.int32)
        self.known: dict[int, Tensor] = {}

    def starts(self, places: int) -> Tensor:
        """Where each sequence begins, (B + 1,) int32, when each takes so many places."""
        if places not in self.known:
            self.known[places] = self.count * places
        return self.known[places]


def has_decode_kernel(x: Tensor) -> bool:
    """Whether a decode step on tensors like `x` uses torch's FlashAttention kernel, which is told every length."""
    return backend(x) != "sdpa"


def _kernel_part(q: Tensor, k: Tensor, v: Tensor, lens: Lengths) -> tuple[Tensor, Tensor]:
    """Attention of q (B, Q, K, D) to the first `lens` (B,) of the keys and values (B, L, K, D).

    Returns the outputs (B, Q, K, D) and the logarithms (B, Q, K) of the sums of exponentials, fp32.
    """
    (batch, queries), room = q.shape[:2], k.shape[1]
    out, log_mass, *_ = FLASH_FORWARD(
        q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), lens.starts(queries), lens.starts(room), queries, room,
        0.0, False, False, seqused_k=lens.int32,
    )  # fmt: skip
    return out.unflatten(0, (batch, queries)), log_mass.T.unflatten(0, (batch, queries))


@fused
def _merge_kernel_parts(place: Tensor, out_1: Tensor, log_mass_1: Tensor, out_2: Tensor, log_mass_2: Tensor) -> Tensor:
    """Both parts (…, H/K, K, D) together, (S, H, D). `place` (S,): where in the first a slot is."""
    share = (log_mass_2 - log_mass_1[place]).sigmoid()[..., None]  # Z_2 / (Z_1 + Z_2)
    whole = out_1[place] * (1 - share) + out_2 * share
    return whole.to(out_2.dtype).transpose(1, 2).flatten(1, 2)


def _plain_part(q: Tensor, k: Tensor, v: Tensor, lens: Lengths) -> tuple[Tensor, Tensor, Tensor]:
    """The same in plain operations, in fp32 or wider, not yet divided: Σ w v (B, Q, K, D), Σ w and m (B, Q, K, 1).

    w = exp(score − m), m the largest score. Sums and not their logarithm, which near 30 is ten times coarser than what
    it would scale.
    """
    q, k, v = (x.to(_sum_dtype(q)).transpose(1, 2) for x in (q, k, v))
    scores = _product(q, k.transpose(2, 3)) * q.shape[-1] ** -0.5  # (B, K, Q, keys)
    hidden = torch.arange(k.shape[2], device=k.device) >= lens.tokens[:, None]
    scores.masked_fill_(hidden[:, None, None], torch.finfo(torch.float32).min)
    top = scores.amax(-1, keepdim=True)
    weights = (scores - top).exp()
    parts = _product(weights.to(v.dtype), v), weights.sum(-1, keepdim=True), top
    return tuple(x.transpose(1, 2) for x in parts)


def _merge_plain_parts(
    place: Tensor, sum_1: Tensor, mass_1: Tensor, top_1: Tensor, sum_2: Tensor, mass_2: Tensor, top_2: Tensor
) -> Tensor:
    sum_1, mass_1, top_1 = sum_1[place], mass_1[place], top_1[place]
    top = torch.maximum(top_1, top_2)
    scale_1, scale_2 = (top_1 - top).exp(), (top_2 - top).exp()
    whole = (scale_1 * sum_1 + scale_2 * sum_2) / (scale_1 * mass_1 + scale_2 * mass_2)
    return whole.transpose(1, 2).flatten(1, 2)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in fp32 or wider, of half-precision factors too: rounded scores would part the sampler from the trainer."""
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    return torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out_dtype=torch.float32).unflatten(0, a.shape[:2])
