"""`model.log_probs` for many rows, with the logits of only some of them in memory at a time.

The plain form is that function's four lines:

    scores = logits(hidden, head, temperature, suppressed)  # (R, V)
    log_p = scores.log_softmax(-1)  # (R, V)
    logps = log_p.gather(-1, targets[:, None])[:, 0]  # (R,)
    entropy = -(log_p.exp() * log_p).sum(-1)  # (R,)

With 16,384 rows and 152,064 words one such matrix takes 10 GB, and autograd keeps several for the backward pass. No row
depends on another, so chunks of rows give the same numbers one after another. The backward pass computes a chunk's
logits again, and is written by hand because the gradient of the head is a sum over the chunks: it is added up in fp32,
where autograd would add in the precision of the head.

A chunk has two sizes. The product with the head reads the whole head, and in the backward pass moves the head's
gradient too, so it wants many rows. The softmax wants few: it holds four numbers for each of its logits.

Shape letters: R rows to score, C rows of a chunk, S rows of a softmax, d hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Callable

import torch
from torch import Tensor

CHUNK_LOGITS = 12 * 2**20  # of a chunk on the CPU: 82 rows of the real vocabulary
CHUNK_BYTES = 2**30  # of all that a chunk takes on CUDA: a thousand rows
CUDA_SOFTMAX_ROWS = 64


def chunked_log_probs(
    logits: Callable[[Tensor, Tensor, float, Tensor | None], Tensor],
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    suppressed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """log p(target) (R,) and entropy in nats (R,), fp32, from hidden (R, d), head (V, d), targets (R,).

    `logits` is `model.logits`: hidden @ head.T / temperature, and a constant for the `suppressed` (V,) ids. It is an
    argument because system/ imports nothing of the model. The entropy carries no gradient. Forward and backward pass
    take the memory of two chunks.
    """
    return _ChunkedLogProbs.apply(logits, hidden, head, targets, temperature, suppressed)


class _ChunkedLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, hidden, head, targets, temperature, suppressed):
        ctx.save_for_backward(hidden, head, targets, suppressed)
        ctx.logits = logits
        ctx.temperature = temperature
        rows, softmax_rows = _chunk_rows(hidden, head)
        logps = []  # of each chunk, (C,)
        entropies = []
        chunks = zip(hidden.split(rows), targets.split(rows))
        for hidden_chunk, target_chunk in chunks:
            scores = logits(hidden_chunk, head, temperature, suppressed)  # (C, V)
            chunk_logps, chunk_entropies = _chunk_log_probs(scores, target_chunk, softmax_rows)
            logps.append(chunk_logps)
            entropies.append(chunk_entropies)
            del scores  # before the next chunk's exist
        entropy = torch.cat(entropies)  # (R,)
        ctx.mark_non_differentiable(entropy)
        return torch.cat(logps), entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, logps_grad: Tensor, _: Tensor):
        hidden, head, targets, suppressed = ctx.saved_tensors
        hidden_grad = torch.empty_like(hidden)  # (R, d)
        head_grad = None  # of a frozen head
        if ctx.needs_input_grad[2]:
            head_grad = torch.zeros_like(head, dtype=torch.float32)  # (V, d)
        rows, softmax_rows = _chunk_rows(hidden, head)
        chunks = zip(
            hidden.split(rows),
            targets.split(rows),
            logps_grad.split(rows),
            hidden_grad.split(rows),
        )
        # The last chunk first, as autograd would.
        for hidden_chunk, target_chunk, grad_chunk, out_chunk in reversed(list(chunks)):
            scores = ctx.logits(hidden_chunk, head, ctx.temperature, suppressed)  # (C, V)
            _replace_by_gradient(scores, target_chunk, grad_chunk, softmax_rows)
            if suppressed is not None:
                scores.masked_fill_(suppressed, 0)  # their logits are constants
            scores.div_(ctx.temperature)
            product_grad = scores.to(hidden.dtype)  # (C, V), of hidden @ head.T
            torch.mm(product_grad, head, out=out_chunk)  # (C, d)
            if head_grad is not None:
                head_grad += product_grad.T @ hidden_chunk  # (V, d)
            del scores, product_grad  # before the next chunk's exist
        if head_grad is not None:
            head_grad = head_grad.to(head.dtype)
        return None, hidden_grad, head_grad, None, None, None


def _chunk_log_probs(scores: Tensor, targets: Tensor, softmax_rows: int) -> tuple[Tensor, Tensor]:
    """log p(target) (C,) and entropy (C,) from logits (C, V)."""
    logps = []
    entropies = []
    parts = zip(scores.split(softmax_rows), targets.split(softmax_rows))
    for part, target in parts:
        # Not logit − logsumexp: both may be near 30, where fp32 is ten times coarser than around a log-probability.
        log_p = part.log_softmax(-1)  # (S, V)
        logp = log_p.gather(-1, target[:, None])[:, 0]  # (S,)
        entropy = -log_p.exp().mul_(log_p).sum(-1)  # (S,)
        logps.append(logp)
        entropies.append(entropy)
    return torch.cat(logps), torch.cat(entropies)


def _replace_by_gradient(scores: Tensor, targets: Tensor, logps_grad: Tensor, softmax_rows: int) -> None:
    """Overwrite logits (C, V) by the gradient of Σ logps_grad · log p(target): logps_grad · (onehot − softmax)."""
    parts = zip(
        scores.split(softmax_rows),
        targets.split(softmax_rows),
        logps_grad.split(softmax_rows),
    )
    for part, target, grad in parts:
        leaf = part.detach().requires_grad_()  # (S, V)
        with torch.enable_grad():
            log_p = leaf.log_softmax(-1)  # (S, V)
            logps = log_p.gather(-1, target[:, None])[:, 0]  # (S,)
        (part_grad,) = torch.autograd.grad(logps, leaf, grad)
        part.copy_(part_grad)


def _chunk_rows(hidden: Tensor, head: Tensor) -> tuple[int, int]:
    """How many rows are multiplied with the head at a time, and how many of these go through a softmax at a time."""
    words = len(head)
    half_precision = hidden.dtype != torch.float32
    if hidden.device.type == "cpu":
        rows = min(1024, max(1, CHUNK_LOGITS // words))
        if half_precision:  # about the same memory: 6 bytes a logit outside of the softmax, not 4, and 16 in it
            return 3 * rows, max(1, rows // 4)
        return rows, rows
    logit_bytes = 4  # fp32
    if half_precision:
        logit_bytes += hidden.element_size()  # its gradient, rounded for the products
    softmax_bytes = 16 * CUDA_SOFTMAX_ROWS * words  # four fp32 numbers for each logit
    rows = (CHUNK_BYTES - softmax_bytes) // (logit_bytes * words)
    return max(CUDA_SOFTMAX_ROWS, rows), CUDA_SOFTMAX_ROWS
