"""Qwen2.5-VL: the decoder, M-RoPE positions, and log-probabilities.

One code path serves sampling, training and the reference. Sequences are packed along one token axis; what sees what is
the caller's `attention_fn` (attention.py), so the same forward pass runs whole sequences, groups that share a prompt,
and decoding from a cache. Weight names are those of the published checkpoints.

Shape letters: N packed tokens, M image tokens, R rows to score, H query heads, K key/value heads, D head size,
d hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Callable, Sequence

import torch
from torch import Tensor, nn

from mmsr.attention import AttentionFn
from mmsr.vision import (
    FRAMES,
    MERGE,
    MLP,
    PATCH,
    Image,
    VisionConfig,
    VisionTower,
    inverse_frequencies,
    rotate,
    run_block,
)

SUPPRESSED_LOGIT = -1e9  # its probability is exactly 0; with -inf, entropy and its gradient would be NaN
TILE = 12 * 2**20  # logits at a time on the CPU: 82 rows of the real vocabulary
TILE_BYTES = 2**30  # on CUDA, of everything that a tile takes: a thousand rows, as each product reads the whole head


# ---- configuration


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and token ids, by the names of config.json. Defaults, for keys that a file lacks, are transformers' own."""

    vocab_size: int = 152064
    hidden_size: int = 8192
    intermediate_size: int = 29568
    num_hidden_layers: int = 80
    num_attention_heads: int = 64
    num_key_value_heads: int = 8
    rms_norm_eps: float = 1e-5
    rope_theta: float = 1_000_000.0
    mrope_section: tuple[int, ...] = (16, 24, 24)  # rotary frequencies that turn with time, row and column
    max_position_embeddings: int = 32768  # this and the next two are for other programs that open a saved folder
    bos_token_id: int = 151643
    eos_token_id: int = 151645
    tie_word_embeddings: bool = False
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653
    vision: VisionConfig = field(default_factory=VisionConfig)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def to_dict(self) -> dict[str, Any]:
        """The hub's flat form, which every version of transformers and other inference programs read."""
        values = asdict(self)
        values["rope_scaling"] = {"type": "mrope", "mrope_section": values.pop("mrope_section")}
        vision = values.pop("vision")
        vision |= {"patch_size": PATCH, "spatial_merge_size": MERGE, "temporal_patch_size": FRAMES}
        return {
            "architectures": ["Qwen2_5_VLForConditionalGeneration"],
            "model_type": "qwen2_5_vl",
            "hidden_act": "silu",
            **values,
            "vision_config": vision,
        }


# ---- positions


def mrope_positions(length: int, images: Sequence[tuple[int, tuple[int, int]]], start: int = 0) -> tuple[Tensor, int]:
    """M-RoPE positions (3, length) long of a stretch of tokens, and the position that the next stretch starts at.

    `images`: (offset of the first placeholder within the stretch, (rows, columns) in patches), in order. Text advances
    time, row and column together; a picture's tokens stand at one time, each at its row and column, and the text after
    it goes on from the largest position used + 1. Token ids play no role. ValueError for pictures that do not fit.
    """
    pieces, done, position = [], 0, start
    for offset, grid in images:
        rows, columns = grid[0] // MERGE, grid[1] // MERGE
        if offset < done or offset + rows * columns > length:
            span = f"{offset}..{offset + rows * columns}"
            raise ValueError(f"image tokens {span} do not fit between token {done} and the end at {length}")
        pieces.append(_text_positions(position, offset - done))
        position += offset - done
        axes = (torch.arange(1), torch.arange(rows), torch.arange(columns))
        pieces.append(torch.cartesian_prod(*axes).T + position)  # (3, rows * columns)
        position += max(rows, columns)
        done = offset + rows * columns
    pieces.append(_text_positions(position, length - done))
    return torch.cat(pieces, 1), position + length - done


def _text_positions(first: int, count: int) -> Tensor:
    return torch.arange(first, first + count).expand(3, -1)


def rotary(position_ids: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """cos and sin (N, 1, D/2), fp32, of positions (3, N): each frequency turns with one of time, row and column."""
    frequencies = inverse_frequencies(config.head_dim, config.rope_theta, position_ids.device)
    angles = position_ids[..., None] * frequencies  # (3, N, D/2)
    angles = torch.cat([part[axis] for axis, part in enumerate(angles.split(config.mrope_section, -1))], -1)
    return angles.cos()[:, None], angles.sin()[:, None]


# ---- the decoder


class SelfAttention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        size, self.head_dim = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(size, config.num_attention_heads * self.head_dim)
        self.k_proj = nn.Linear(size, config.num_key_value_heads * self.head_dim)
        self.v_proj = nn.Linear(size, config.num_key_value_heads * self.head_dim)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attention_fn: AttentionFn, layer: int) -> Tensor:
        heads = (-1, self.head_dim)
        q = rotate(self.q_proj(x).unflatten(-1, heads), cos, sin)  # (N, H, D)
        k = rotate(self.k_proj(x).unflatten(-1, heads), cos, sin)  # (N, K, D)
        v = self.v_proj(x).unflatten(-1, heads)
        return self.o_proj(attention_fn(layer, q, k, v).flatten(1))


class DecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.self_attn = SelfAttention(config)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, bias=False)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attention_fn: AttentionFn, layer: int) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attention_fn, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Holds the weights under the checkpoints' names `model.*`; Qwen2_5_VL.forward runs them."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class Qwen2_5_VL(nn.Module):
    """The whole model.

    `checkpoint_blocks` recomputes decoder blocks in the backward pass, all but the last `kept_blocks`: each of those
    costs memory and saves its share of a forward pass. The last, as they are the first to be used up in the backward
    pass. `visual` has its own switch.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.checkpoint_blocks = False
        self.kept_blocks = 0
        self.visual = VisionTower(config.vision)
        self.model = Decoder(config)
        untied = not config.tie_word_embeddings
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False) if untied else None

    @property
    def head_weight(self) -> Tensor:
        """(V, d)"""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def encode_images(self, images: Sequence[Image]) -> Tensor:
        """Features (M, d) of pictures, one after another."""
        return self.visual(images)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_fn: AttentionFn,
        image_features: Tensor | None = None,
        image_index: Tensor | None = None,
        head_fn: Callable[[Tensor, Tensor], Any] | None = None,
    ) -> Any:
        """Hidden states (N, d) after the final norm of tokens `input_ids` (N,) at `position_ids` (3, N).

        `image_features` (M, d) take the places `image_index` (M,) of the packed axis. With `head_fn`, the value is
        head_fn(hidden, head weight (V, d)), called in here because only here does FSDP hold the head in one piece.
        """
        hidden = self.model.embed_tokens(input_ids)
        if image_features is not None:
            hidden = hidden.index_copy(0, image_index, image_features.to(hidden.dtype))
        # Angles need fp32 (positions run to thousands); the rotation itself is done in the model's precision.
        cos, sin = (x.to(hidden.dtype) for x in rotary(position_ids, self.config))
        for index, layer in enumerate(self.model.layers):
            recompute = self.checkpoint_blocks and index < self.config.num_hidden_layers - self.kept_blocks
            hidden = run_block(layer, recompute, hidden, cos, sin, attention_fn, index)
        hidden = self.model.norm(hidden)
        return hidden if head_fn is None else head_fn(hidden, self.head_weight)


# ---- log-probabilities: the one place where engine, trainer and reference get them


def logits(hidden: Tensor, head: Tensor, temperature: float = 1.0, suppressed: Tensor | None = None) -> Tensor:
    """fp32 logits (R, V) of hidden (R, d) and head (V, d), over the temperature.

    `suppressed` (V,) bool: these ids get probability 0.
    """
    values = _scores(hidden, head)
    if temperature != 1:
        values.div_(temperature)
    return values if suppressed is None else values.masked_fill_(suppressed, SUPPRESSED_LOGIT)


def _scores(hidden: Tensor, head: Tensor) -> Tensor:
    """hidden @ head.T (R, V) in fp32, or wider if they are.

    On CUDA half-precision factors give fp32 results: rounded to bfloat16, a logit near 30 is off by up to a sixteenth,
    which the sampler's and the trainer's log-probabilities would differ by. Other devices have no such product; in
    tests and plans the meta device is a GPU.
    """
    if hidden.dtype in (torch.bfloat16, torch.float16) and hidden.device.type in ("cuda", "meta"):
        return torch.mm(hidden, head.T, out_dtype=torch.float32)
    return (hidden @ head.T).float()


def log_probs(
    hidden: Tensor, head: Tensor, targets: Tensor, temperature: float = 1.0, suppressed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """log p(target) (R,) and entropy in nats (R,), fp32, from hidden (R, d), head (V, d), targets (R,).

    The entropy carries no gradient. Only some rows of logits exist at a time, in the backward pass too, which makes
    them again: the memory of two tiles in all.
    """
    return _LogProbs.apply(hidden, head, targets, temperature, suppressed)


class _LogProbs(torch.autograd.Function):
    """`log_probs`. Its own backward pass, so that half-precision rows add up their gradient of the head in fp32."""

    @staticmethod
    def forward(ctx, hidden: Tensor, head: Tensor, targets: Tensor, temperature: float, suppressed: Tensor | None):
        ctx.save_for_backward(hidden, head, targets, suppressed)
        ctx.temperature = temperature
        tile, part = _tile_rows(hidden, head)
        found = [
            _tile_log_probs(logits(rows, head, temperature, suppressed), wanted, part)
            for rows, wanted in _tiles(tile, hidden, targets)
        ]
        logps, entropy = (torch.cat(values) for values in zip(*found))
        ctx.mark_non_differentiable(entropy)
        return logps, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor, _: Tensor):
        hidden, head, targets, suppressed = ctx.saved_tensors
        to_hidden = torch.empty_like(hidden)
        to_head = torch.zeros_like(head, dtype=torch.float32)
        tile, part = _tile_rows(hidden, head)
        for rows, wanted, scale, out in reversed(_tiles(tile, hidden, targets, gradient[:, None], to_hidden)):
            scores = logits(rows, head, ctx.temperature, suppressed)
            slopes = _tile_slopes(scores, wanted, scale, part, ctx.temperature, suppressed).to(rows.dtype)
            torch.mm(slopes, head, out=out)
            to_head += slopes.T @ rows
            del scores, slopes  # before the next tile's are made
        return to_hidden, to_head.to(head.dtype), None, None, None


def _tile_log_probs(scores: Tensor, targets: Tensor, part: int) -> tuple[Tensor, Tensor]:
    """log p(target) (R,) and entropy (R,) from `logits` (R, V); `part` rows at a time."""
    logps, entropy = [], []
    for some, wanted in _tiles(part, scores, targets):
        # Not logit − logsumexp: both may be near 30, where fp32 is ten times coarser than around a log-probability.
        every = some.log_softmax(-1)
        logps.append(every.gather(-1, wanted[:, None])[:, 0])
        entropy.append(-every.exp().mul_(every).sum(-1))
    return torch.cat(logps), torch.cat(entropy)


def _tile_slopes(
    scores: Tensor, targets: Tensor, scale: Tensor, part: int, temperature: float, suppressed: Tensor | None
) -> Tensor:
    """Gradient (R, V), fp32, of Σ scale · log p(target) with respect to hidden @ head.T; scale (R, 1).

    It takes the place of `scores`, the tile's `logits`, `part` rows at a time.
    """
    for some, wanted, each in _tiles(part, scores, targets, scale):
        every = some.log_softmax(-1)
        slope = torch.zeros_like(every).scatter_(1, wanted[:, None], each)
        slope = torch.ops.aten._log_softmax_backward_data(slope, every, -1, slope.dtype)
        if suppressed is not None:
            slope.masked_fill_(suppressed, 0)
        some.copy_(slope.div_(temperature))
    return scores


def _tile_rows(hidden: Tensor, head: Tensor) -> tuple[int, int]:
    """How many rows are multiplied with the head at a time, and how many of these go through a softmax at a time.

    A product reads the whole head, and in the backward pass it moves the head's gradient too, so it wants many rows.
    A softmax wants few: four numbers for each of its logits are in memory at once.
    """
    words, half = len(head), hidden.dtype != torch.float32
    if hidden.device.type == "cpu":
        rows = min(1024, max(1, TILE // words))
        return (3 * rows, max(1, rows // 4)) if half else (rows, rows)
    part = 64
    room = TILE_BYTES - 16 * part * words
    return max(part, room // ((4 + half * hidden.element_size()) * words)), part


def _tiles(rows: int, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """The tensors cut alike along their first axis into at most `rows`."""
    return list(zip(*(x.split(rows) for x in tensors)))


# ---- random weights


def random_model(
    config: ModelConfig, seed: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Qwen2_5_VL:
    """A model with fresh weights: matrices normal with standard deviation .02, norms 1, biases 0."""
    with torch.device("meta"):
        model = Qwen2_5_VL(config).to(dtype)
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.02, generator=generator)
            else:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
    return model
