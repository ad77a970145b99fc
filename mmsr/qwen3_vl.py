"""Qwen3-VL: what differs from Qwen2.5-VL (arXiv 2511.21631). The 2B, 4B, 8B and 32B models; no mixture of experts.

The decoder is that of model.py with three changes:

- Queries and keys pass an RMSNorm, head by head, before they are turned. Their projections have no biases.
- M-RoPE is interleaved: neighbouring rotary frequencies turn with time, row and column in turn, so each of the three
  has slow and fast ones (`rotary_axes`). Positions are the same.
- DeepStack (arXiv 2406.04334): what a picture's tokens were after three of the tower's blocks is added to them again
  after the first three blocks of the decoder.

The vision tower has no windows. It has LayerNorm in place of RMSNorm, an ordinary MLP, patches of 16 x 16 pixels, and a
learned embedding for the place of each patch, on top of the rotary one. That embedding is a table of 48 x 48 places,
stretched over the picture (`layout`).

Shape letters: N packed tokens, P patches, M = P / 4 merged tokens, H query heads, K key/value heads, D head size,
d hidden size (the tower's in the tower), n DeepStack levels.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any, Callable, ClassVar, NamedTuple, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmsr.attention import AttentionFn
from mmsr.model import Decoder, ModelConfig, VLModel
from mmsr.vision import (
    CHANNELS,
    FRAMES,
    MERGE,
    Image,
    PatchEmbed,
    Processor,
    VisionBlock,
    apart,
    inverse_frequencies,
    patch_positions,
    project,
    rotary_angles,
    rotate,
    run_block,
)

QWEN3_VL = Processor(patch=16, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


# ---- configuration


@dataclass(frozen=True)
class Qwen3VisionConfig:
    """Sizes of the tower. Names and defaults are transformers'."""

    processor: ClassVar[Processor] = QWEN3_VL
    hidden_act: ClassVar[str] = "gelu_pytorch_tanh"
    mlp_rows: ClassVar[int] = 2  # as wide as the MLP, that its backward pass needs: before and after the GELU

    depth: int = 27
    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_heads: int = 16
    out_hidden_size: int = 3584
    num_position_embeddings: int = 2304  # the square of the table's side
    deepstack_visual_indexes: tuple[int, ...] = (8, 16, 24)  # the blocks whose output the decoder gets too

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def feature_size(self) -> int:
        """Numbers that the tower gives for a merged token: its features, and those of each DeepStack level."""
        return (1 + len(self.deepstack_visual_indexes)) * self.out_hidden_size


@dataclass(frozen=True)
class Qwen3VLConfig(ModelConfig):
    """`ModelConfig` with other defaults, and a head size of its own."""

    model_type: ClassVar[str] = "qwen3_vl"
    head_norms: ClassVar[bool] = True
    nested_names: ClassVar[bool] = True

    vocab_size: int = 151936
    hidden_size: int = 4096
    intermediate_size: int = 22016
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    rms_norm_eps: float = 1e-6
    rope_theta: float = 500_000.0
    mrope_section: tuple[int, ...] = (24, 20, 20)  # how many rotary frequencies turn with time, row and column
    max_position_embeddings: int = 128_000
    vision: Qwen3VisionConfig = field(default_factory=Qwen3VisionConfig)  # type: ignore[assignment]
    head_dim: int = 128

    def build(self) -> VLModel:
        """The model of these sizes. Its weights are still to be set."""
        return Qwen3_VL(self)

    def to_dict(self) -> dict[str, Any]:
        """The values of config.json in the hub's form: those of the decoder in `text_config`."""
        text = asdict(self)
        text["rope_scaling"] = {
            "rope_type": "default",
            "mrope_interleaved": True,
            "mrope_section": text.pop("mrope_section"),
        }
        vision = text.pop("vision")
        vision |= {
            "model_type": self.model_type,
            "hidden_act": self.vision.hidden_act,
            "in_channels": CHANNELS,
            "patch_size": self.vision.processor.patch,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": FRAMES,
        }
        outside = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        return {
            "architectures": ["Qwen3VLForConditionalGeneration"],
            "model_type": self.model_type,
            **{name: text.pop(name) for name in outside},
            "tie_word_embeddings": text["tie_word_embeddings"],
            "text_config": {"model_type": "qwen3_vl_text", "hidden_act": "silu", "attention_bias": False, **text},
            "vision_config": vision,
        }


# ---- positions


@lru_cache
def rotary_axes(section: tuple[int, ...], device: torch.device) -> Tensor:
    """Which of a token's three positions each rotary frequency turns with, (D/2,): 0 time, 1 row, 2 column.

    Frequencies run from fast to slow. With `section` (4, 2, 2), of D = 16, they turn with

        time row column time row column time time
    """
    axes = torch.zeros(sum(section), dtype=torch.long)
    axes[1 : 3 * section[1] : 3] = 1
    axes[2 : 3 * section[2] : 3] = 2
    return axes.to(device)


def rotary(position_ids: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """cos and sin (N, 1, D/2), fp32, of the angles by which positions (3, N) turn queries and keys."""
    frequencies = inverse_frequencies(config.head_dim, config.rope_theta, position_ids.device)  # (D/2,)
    axes = rotary_axes(config.mrope_section, position_ids.device)  # (D/2,)
    angles = position_ids[axes].T * frequencies  # (N, D/2)
    cos = angles.cos()[:, None]  # (N, 1, D/2)
    sin = angles.sin()[:, None]  # (N, 1, D/2)
    return cos, sin


# ---- the decoder


class SelfAttention(nn.Module):
    """As model.py's, with q and k normalised head by head and no bias: written out, so that it reads in one piece."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim = config.head_dim
        q_size = config.num_attention_heads * self.head_dim
        kv_size = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        attention_fn: AttentionFn,
        layer: int,
    ) -> Tensor:
        heads = (-1, self.head_dim)
        q, k, v = project(x, self.q_proj, self.k_proj, self.v_proj)
        q = self.q_norm(q.unflatten(-1, heads))  # (N, H, D)
        k = self.k_norm(k.unflatten(-1, heads))  # (N, K, D)
        v = v.unflatten(-1, heads)  # (N, K, D)
        q = rotate(q, cos, sin)
        k = rotate(k, cos, sin)
        out = attention_fn(layer, q, k, v)  # (N, H, D)
        return self.o_proj(out.flatten(1))  # (N, d)


class Qwen3_VL(VLModel):
    def __init__(self, config: Qwen3VLConfig):
        super().__init__(config, VisionTower(config.vision), Decoder(config, SelfAttention))

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_fn: AttentionFn,
        image_features: Tensor | None = None,
        image_index: Tensor | None = None,
        head_fn: Callable[[Tensor, Tensor], Any] | None = None,
    ) -> Any:
        """Hidden states (N, d) after the final norm, of tokens `input_ids` (N,) at `position_ids` (3, N).

        `image_features` (M, (1 + n) d): the first d numbers of each row replace the embedding of a token
        `image_index` (M,), the next d are added to it after the first block, and so on. With `head_fn` the result is
        head_fn(hidden, head weight (V, d)); it is called in here because only here does FSDP hold the whole head.
        """
        hidden = self.model.embed_tokens(input_ids)  # (N, d)
        deepstack: Sequence[Tensor] = ()  # (M, d) for each of the first blocks
        if image_features is not None:
            image_features = image_features.to(hidden.dtype)
            features, *deepstack = image_features.split(hidden.shape[-1], -1)  # (M, d) each
            hidden = hidden.index_copy(0, image_index, features)
        # Angles need fp32 (positions run to thousands); the rotation itself is done in the model's precision.
        cos, sin = rotary(position_ids, self.config)  # (N, 1, D/2)
        cos = cos.to(hidden.dtype)
        sin = sin.to(hidden.dtype)
        recomputed = self.recomputed_blocks()
        for i, layer in enumerate(self.model.layers):
            hidden = run_block(layer, i < recomputed, hidden, cos, sin, attention_fn, i)
            if i < len(deepstack):
                hidden = hidden.index_add(0, image_index, deepstack[i])
        return self.finish(hidden, head_fn)


# ---- the vision tower


class Layout(NamedTuple):
    """Where a picture's patches are, in stored order."""

    places: Tensor  # (P, 4) long: the rows of the table of learned embeddings around each patch
    weights: Tensor  # (P, 4) fp32: how much of each it gets
    angles: Tensor  # (P, D/2) fp32: rotary angles


@lru_cache(maxsize=512)
def layout(grid: tuple[int, int], side: int, head_dim: int) -> Layout:
    """The layout of a picture of `grid` patches, for a table of side² places.

    The table is stretched over the picture, its corners on the corner patches. A patch that falls between four places
    gets the bilinear mean of their embeddings.
    """
    row, column = [axis.flatten() for axis in patch_positions(grid)]  # (P,) each
    upper, lower, down = _neighbours(row, grid[0], side)  # (P,) each
    left, right, across = _neighbours(column, grid[1], side)  # (P,) each
    places = [upper * side + left, upper * side + right, lower * side + left, lower * side + right]
    weights = [(1 - down) * (1 - across), (1 - down) * across, down * (1 - across), down * across]
    angles = rotary_angles(row, column, head_dim)
    return Layout(torch.stack(places, 1), torch.stack(weights, 1), angles)


def _neighbours(index: Tensor, length: int, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """The table's places before and after each patch `index` (P,) of an axis of `length`, and how far in between."""
    place = index.float() * (side - 1) / max(length - 1, 1)
    before = place.floor()
    after = (before + 1).clamp(max=side - 1)
    return before.long(), after.long(), place - before


class VisionMLP(nn.Module):
    """fc2(gelu(fc1 x)), with the GELU of a hyperbolic tangent."""

    def __init__(self, config: Qwen3VisionConfig):
        super().__init__()
        self.linear_fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.linear_fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_fc2(F.gelu(self.linear_fc1(x), approximate="tanh"))


class PatchMerger(nn.Module):
    """Four patches to one token. The norm is over each patch, or (`norm_merged`, DeepStack) over the four together."""

    def __init__(self, config: Qwen3VisionConfig, norm_merged: bool):
        super().__init__()
        merged = config.hidden_size * MERGE**2
        self.norm_merged = norm_merged
        self.norm = nn.LayerNorm(merged if norm_merged else config.hidden_size, eps=1e-6)
        self.linear_fc1 = nn.Linear(merged, merged)
        self.linear_fc2 = nn.Linear(merged, config.out_hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """(P, d) to (M, out_hidden_size)."""
        if not self.norm_merged:
            x = self.norm(x)
        x = x.unflatten(0, (-1, MERGE**2)).flatten(1)  # (M, 4 d)
        if self.norm_merged:
            x = self.norm(x)
        return self.linear_fc2(F.gelu(self.linear_fc1(x)))


class VisionTower(nn.Module):
    """Qwen3-VL's vision encoder. Set `checkpoint_blocks` to trade a second forward pass for activation memory."""

    def __init__(self, config: Qwen3VisionConfig):
        super().__init__()
        self.config = config
        self.checkpoint_blocks = False
        self.patch_embed = PatchEmbed(config.hidden_size, config.processor, bias=True)
        self.pos_embed = nn.Embedding(config.num_position_embeddings, config.hidden_size)
        self.blocks = nn.ModuleList()
        for _ in range(config.depth):
            block = VisionBlock(config.hidden_size, config.head_dim, nn.LayerNorm, VisionMLP(config))
            self.blocks.append(block)
        self.merger = PatchMerger(config, norm_merged=False)
        levels = [PatchMerger(config, norm_merged=True) for _ in config.deepstack_visual_indexes]
        self.deepstack_merger_list = nn.ModuleList(levels)

    def forward(self, images: Sequence[Image]) -> Tensor:
        """Features (M, (1 + n) out_hidden_size) of at least one picture, `image.tokens` rows each, in the order given.

        A row is what takes the token's place, then what each DeepStack level adds.
        """
        device = self.pos_embed.weight.device
        side = math.isqrt(self.config.num_position_embeddings)
        layouts = [layout(image.grid, side, self.config.head_dim) for image in images]
        places, weights, angles = [torch.cat(parts).to(device) for parts in zip(*layouts)]
        cos = angles.cos()[:, None]  # (P, 1, D/2)
        sin = angles.sin()[:, None]  # (P, 1, D/2)
        pictures = apart([len(image.patches) for image in images], device)

        patches = torch.cat([image.patches for image in images])  # (P, 1536)
        hidden = self.patch_embed(patches.to(device))  # (P, d)
        learned = self.pos_embed(places) * weights[..., None]  # (P, 4, d)
        hidden = hidden + learned.sum(1).to(hidden.dtype)
        levels = []  # (M, out_hidden_size) each
        for i, block in enumerate(self.blocks):
            hidden = run_block(block, self.checkpoint_blocks, hidden, cos, sin, pictures)
            if i in self.config.deepstack_visual_indexes:
                levels.append(self.deepstack_merger_list[len(levels)](hidden))
        return torch.cat([self.merger(hidden), *levels], -1)
