"""Pictures: encoded bytes → patches → features for the decoder.

`load_image` does what transformers' Qwen2-VL image processor does, with PIL and numpy alone. `VisionTower` is
Qwen2.5-VL's encoder (arXiv 2502.13923, section 2.1): patches of one picture attend to each other within windows of
112 x 112 pixels, in a few blocks to the whole picture, and every 2 x 2 patches are merged into one token. No video.

Shape letters: P patches of all pictures, M = P / 4 merged tokens, H heads, D head size, d hidden size.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Sequence

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmsr.attention import Segments, packed_attention
from mmsr.system.fuse import fused
from mmsr.system.images import check_aspect, decode, stored_size

PATCH = 14  # pixels along one side
MERGE = 2  # patches along one side of a merged token
SIDE = PATCH * MERGE  # pixels along one side of a merged token
FRAMES = 2  # the patch embedding was trained on video: a still picture is shown twice
CHANNELS = 3
PATCH_VALUES = CHANNELS * FRAMES * PATCH * PATCH  # 1176

MIN_PIXELS, MAX_PIXELS = 56 * 56, 14 * 14 * 4 * 1280  # the image processor's defaults

CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)
# (256, 3): a byte's normalised value in each channel, rounded where transformers rounds.
NORMALISED = ((np.arange(256)[:, None] * (1 / 255)).astype(np.float32) - CLIP_MEAN) / CLIP_STD


# ---- pictures


@dataclass(frozen=True, eq=False)
class Image:
    """A picture as the tower wants it."""

    patches: Tensor  # (P, 1176) float32; the four patches of a merged token are neighbours
    grid: tuple[int, int]  # rows and columns in patches, both even
    key: str  # identity of the content: equal keys have equal patches, so each distinct picture is encoded once

    @property
    def tokens(self) -> int:
        """Number of placeholder tokens, and of rows of features."""
        return self.grid[0] * self.grid[1] // MERGE**2


def load_image(data: bytes, min_pixels: int = MIN_PIXELS, max_pixels: int = MAX_PIXELS, upright: bool = False) -> Image:
    """Decode a picture file and resize it to between `min_pixels` and `max_pixels` pixels, aspect kept.

    As in transformers, transparency is laid on white, an animation gives its first frame, and EXIF turns nothing unless
    `upright`: the model sees a question's picture as it is stored, and so do boxes that it names. Unlike there, 16-bit
    grey is scaled to 8 bits, where the processor would make it white.
    Raises ValueError, in one line, for a file that is too large, broken, of another format, or too elongated.
    """
    key = hashlib.sha256(data + f"|{min_pixels}|{max_pixels}{'|upright' * upright}".encode()).hexdigest()
    return prepare(decode(data, upright=upright), key, min_pixels, max_pixels)


def prepare(picture: PIL.Image.Image, key: str, min_pixels: int, max_pixels: int) -> Image:
    """What `load_image` does once an RGB picture is decoded."""
    height, width = smart_resize(picture.height, picture.width, min_pixels, max_pixels)
    pixels = np.asarray(picture.resize((width, height), PIL.Image.Resampling.BICUBIC))
    return Image(patchify(pixels), (height // PATCH, width // PATCH), key)


def image_tokens(data: bytes, min_pixels: int = MIN_PIXELS, max_pixels: int = MAX_PIXELS) -> int:
    """How many tokens `load_image` would make of a picture file, from its header alone; 0 for one that it refuses."""
    try:
        width, height = stored_size(data)
        height, width = smart_resize(height, width, min_pixels, max_pixels)
    except ValueError:
        return 0
    return height * width // SIDE**2


def smart_resize(height: int, width: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Height and width as multiples of SIDE, their product within the limits, the aspect nearly kept.

    Raises ValueError when one side is more than 200 times the other.
    """
    check_aspect(width, height)
    # Python's round takes halves to the even neighbour, and so did Qwen2-VL's training.
    h, w = round(height / SIDE) * SIDE, round(width / SIDE) * SIDE
    if h * w > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        h = max(SIDE, math.floor(height / shrink / SIDE) * SIDE)
        w = max(SIDE, math.floor(width / shrink / SIDE) * SIDE)
    elif h * w < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        h = math.ceil(height * grow / SIDE) * SIDE
        w = math.ceil(width * grow / SIDE) * SIDE
    return h, w


def patchify(pixels: np.ndarray) -> Tensor:
    """RGB bytes (h, w, 3) to normalised patches (P, 1176), merged tokens in reading order.

    Raises ValueError unless both sides are multiples of 28.
    """
    height, width, _ = pixels.shape
    if height % SIDE or width % SIDE:
        raise ValueError(f"picture of {width} x {height} pixels: both sides must be multiples of {SIDE}")
    values = NORMALISED[pixels, np.arange(CHANNELS)]  # (h, w, 3)
    values = values.reshape(height // SIDE, MERGE, PATCH, width // SIDE, MERGE, PATCH, CHANNELS)
    values = values.transpose(0, 3, 1, 4, 6, 2, 5)  # (token row, token column, 2, 2, channel, 14, 14)
    frames = np.repeat(values[..., None, :, :], FRAMES, axis=-3)
    return torch.from_numpy(frames.reshape(-1, PATCH_VALUES))


# ---- what the tower shares with the decoder


@lru_cache
def inverse_frequencies(size: int, theta: float, device: torch.device) -> Tensor:
    """theta^(-2i/size) for i < size / 2, fp32. Computed on the CPU, so that every device turns by the same angles.

    Not a module buffer, so a build on the meta device cannot leave it behind, nor `model.to(bfloat16)` round it.
    """
    return (1.0 / theta ** (torch.arange(0, size, 2, dtype=torch.float32, device="cpu") / size)).to(device)


@fused
def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (N, H, D): pairs (i, i + D/2) turn by the angles of cos and sin (N, 1, D/2).

    cos and sin in fp32 make the rotation itself fp32: the tower wants that, the decoder does not.
    """
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


@fused
def gated(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


class MLP(nn.Module):
    """SwiGLU: down(silu(gate x) * up x)."""

    def __init__(self, size: int, intermediate: int, bias: bool):
        super().__init__()
        self.gate_proj = nn.Linear(size, intermediate, bias=bias)
        self.up_proj = nn.Linear(size, intermediate, bias=bias)
        self.down_proj = nn.Linear(intermediate, size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(gated(self.gate_proj(x), self.up_proj(x)))


def run_block(block: nn.Module, recompute: bool, *args) -> Tensor:
    """block(*args). With `recompute` only its inputs are kept, and a backward pass runs it again."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False)  # nothing random in a block
    return block(*args)


# ---- the tower


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of the tower. Names and defaults are the checkpoints'."""

    depth: int = 32
    hidden_size: int = 1280
    intermediate_size: int = 3420
    num_heads: int = 16
    out_hidden_size: int = 3584
    window_size: int = 112  # pixels along one side
    fullatt_block_indexes: tuple[int, ...] = (7, 15, 23, 31)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


@dataclass(frozen=True)
class WindowOrder:
    """How one picture's merged tokens are rearranged so that each window is a run of neighbours."""

    order: Tensor  # (M,) long: which token stands here
    lens: tuple[int, ...]  # patches in each window
    angles: Tensor  # (P, D/2) fp32: rotary angles in that order, the row's first, then the column's


@lru_cache(maxsize=512)
def window_order(grid: tuple[int, int], window: int, head_dim: int) -> WindowOrder:
    """`grid` in patches, `window` in merged tokens along a side. Windows at the right and the bottom may be smaller."""
    rows, columns = grid[0] // MERGE, grid[1] // MERGE
    tokens = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))  # (M, 2)
    number = tokens[:, 0] // window * columns + tokens[:, 1] // window  # grows along the windows in reading order
    order = number.argsort(stable=True)
    lens = number[order].unique_consecutive(return_counts=True)[1] * MERGE**2
    inside = torch.cartesian_prod(torch.arange(MERGE), torch.arange(MERGE))
    positions = (tokens[order][:, None] * MERGE + inside).flatten(0, 1)  # (P, 2) row and column
    angles = positions[..., None] * inverse_frequencies(head_dim // 2, 10_000.0, torch.device("cpu"))
    return WindowOrder(order, tuple(lens.tolist()), angles.flatten(1))


class VisionAttention(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, segments: Segments) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, self.head_dim)).unbind(1)  # (P, H, D) each
        out = packed_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, segments)
        return self.proj(out.flatten(1))


class VisionBlock(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.norm1 = nn.RMSNorm(config.hidden_size, eps=1e-6)
        self.norm2 = nn.RMSNorm(config.hidden_size, eps=1e-6)
        self.attn = VisionAttention(config)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, bias=True)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, segments: Segments) -> Tensor:
        x = x + self.attn(self.norm1(x), cos, sin, segments)
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        shape = (FRAMES, PATCH, PATCH)
        self.proj = nn.Conv3d(CHANNELS, config.hidden_size, shape, shape, bias=False)  # the checkpoint's weight shape

    def forward(self, patches: Tensor) -> Tensor:
        """(P, 1176) to (P, d). The kernel covers a patch exactly, so the convolution is one matrix product."""
        return F.linear(patches.to(self.proj.weight.dtype), self.proj.weight.flatten(1))


class PatchMerger(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        merged = config.hidden_size * MERGE**2
        self.ln_q = nn.RMSNorm(config.hidden_size, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(merged, merged), nn.GELU(), nn.Linear(merged, config.out_hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.ln_q(x).unflatten(0, (-1, MERGE**2)).flatten(1))  # (P, d) to (M, out)


class VisionTower(nn.Module):
    """Qwen2.5-VL's vision encoder. Set `checkpoint_blocks` to trade a second forward pass for activation memory."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.checkpoint_blocks = False
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))
        self.merger = PatchMerger(config)

    def forward(self, images: Sequence[Image]) -> Tensor:
        """Features (M, out_hidden_size) of at least one picture, `image.tokens` rows each, in the order given."""
        device = self.patch_embed.proj.weight.device
        order, angles, windows = self._layout(images, device)
        whole = self._segments([len(image.patches) for image in images], device)
        patches = torch.cat([image.patches for image in images]).to(device)
        hidden = self.patch_embed(patches).unflatten(0, (-1, MERGE**2))[order].flatten(0, 1)  # (P, d), window by window
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]  # (P, 1, D/2)
        for index, block in enumerate(self.blocks):
            segments = whole if index in self.config.fullatt_block_indexes else windows
            hidden = run_block(block, self.checkpoint_blocks, hidden, cos, sin, segments)
        return self.merger(hidden)[order.argsort()]

    def _layout(self, images: Sequence[Image], device: torch.device) -> tuple[Tensor, Tensor, Segments]:
        """Cached pieces of each picture's grid put together: order (M,), angles (P, D/2), one segment a window."""
        window = self.config.window_size // SIDE
        pieces = [window_order(image.grid, window, self.config.head_dim) for image in images]
        tokens = torch.tensor([image.tokens for image in images])
        first = (tokens.cumsum(0) - tokens).repeat_interleave(tokens)  # (M,) where the picture of this token begins
        order = torch.cat([piece.order for piece in pieces]) + first
        angles = torch.cat([piece.angles for piece in pieces])
        lens = [length for piece in pieces for length in piece.lens]
        return order.to(device), angles.to(device), self._segments(lens, device)

    @staticmethod
    def _segments(lens: list[int], device: torch.device) -> Segments:
        return Segments.of(lens, lens, causal=False, device=device)
