"""Pictures: encoded bytes → patches → features for the decoder.

`load_image` does what the published processors do (transformers' `Qwen2VLImageProcessor`), with PIL and numpy alone.
How large a patch is depends on the model: its `Processor`.
`VisionTower` is Qwen2.5-VL's encoder (arXiv 2502.13923, section 2.1): patches of one picture attend to each other
within windows of 112 x 112 pixels, in a few blocks to the whole picture, and every 2 x 2 patches are merged into one
token. No video. Qwen3-VL's encoder is in qwen3_vl.py.

A picture of 4 x 6 patches, numbered in the order in which they are stored. The four patches of a merged token are
neighbours, and the merged tokens A to F are in reading order:

     0  1 |  4  5 |  8  9
     2  3 |  6  7 | 10 11         A B C
    ------+-------+------    →    D E F
    12 13 | 16 17 | 20 21
    14 15 | 18 19 | 22 23

Inside the tower tokens are reordered so that each window is a run of neighbours. With windows of 2 x 2 tokens (really
4 x 4) the order is A B D E | C F, and the runs have 16 and 8 patches. The features come out as A B C D E F again.

Shape letters: P patches of all pictures, M = P / 4 merged tokens, H heads, D head size, d hidden size.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import ClassVar, Sequence

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmsr.attention import Segments, packed_attention
from mmsr.system.fuse import fused
from mmsr.system.images import check_aspect, decode, stored_size

MERGE = 2  # patches along one side of a merged token
FRAMES = 2  # the patch embedding was trained on video: a still picture is shown twice
CHANNELS = 3

# The defaults of Qwen2-VL's image processor.
MIN_PIXELS = 56 * 56
MAX_PIXELS = 28 * 28 * 1280


# ---- pictures


@dataclass(frozen=True)
class Processor:
    """How a model's pictures become patches: what the published preprocessor_config.json says."""

    patch: int  # pixels along one side
    mean: tuple[float, float, float]  # of red, green and blue
    std: tuple[float, float, float]

    @property
    def side(self) -> int:
        """Pixels along one side of a merged token."""
        return self.patch * MERGE

    @property
    def patch_values(self) -> int:
        """Numbers in a patch: 1176, where it has 14 x 14 pixels."""
        return CHANNELS * FRAMES * self.patch**2

    @cached_property
    def normalised(self) -> np.ndarray:
        """`rescale` and `normalize` of the image processor: each byte's value (256, 3), rounded where it rounds."""
        rescaled = np.arange(256) * (1 / 255)  # (256,)
        mean = np.array(self.mean, dtype=np.float32)
        std = np.array(self.std, dtype=np.float32)
        return (rescaled.astype(np.float32)[:, None] - mean) / std


QWEN2_5_VL = Processor(
    patch=14,
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
)


@dataclass(frozen=True, eq=False)
class Image:
    """A picture as the tower takes it."""

    patches: Tensor  # (P, patch_values) float32; the four patches of a merged token are neighbours
    grid: tuple[int, int]  # rows and columns in patches, both even
    key: str  # identity of the content: equal keys have equal patches, so each distinct picture is encoded once

    @property
    def tokens(self) -> int:
        """Number of placeholder tokens, and of rows of features."""
        rows, columns = self.grid
        return rows * columns // MERGE**2


def load_image(
    data: bytes,
    min_pixels: int = MIN_PIXELS,
    max_pixels: int = MAX_PIXELS,
    upright: bool = False,
    processor: Processor = QWEN2_5_VL,
) -> Image:
    """Decode a picture file and resize it to between `min_pixels` and `max_pixels` pixels, aspect kept.

    As in transformers, transparency is laid on white, an animation gives its first frame, and EXIF turns nothing unless
    `upright`: the model sees a question's picture as it is stored, and its boxes refer to that. Unlike there, 16-bit
    grey is scaled to 8 bits; the processor would make it white.
    Raises ValueError, in one line, for a file that is too large, broken, of another format, or too elongated.
    """
    settings = f"|{min_pixels}|{max_pixels}|{processor}"
    if upright:
        settings += "|upright"
    key = hashlib.sha256(data + settings.encode()).hexdigest()
    picture = decode(data, upright=upright)
    return prepare(picture, key, min_pixels, max_pixels, processor)


def prepare(
    picture: PIL.Image.Image,
    key: str,
    min_pixels: int,
    max_pixels: int,
    processor: Processor = QWEN2_5_VL,
) -> Image:
    """What `load_image` does once an RGB picture is decoded."""
    height, width = smart_resize(picture.height, picture.width, min_pixels, max_pixels, processor.side)
    resized = picture.resize((width, height), PIL.Image.Resampling.BICUBIC)
    return to_image(np.asarray(resized), key, processor)


def to_image(pixels: np.ndarray, key: str, processor: Processor = QWEN2_5_VL) -> Image:
    """The picture of RGB bytes (h, w, 3) whose sides are multiples of `processor.side`. Nothing is resized."""
    height, width, _ = pixels.shape
    grid = (height // processor.patch, width // processor.patch)
    return Image(patchify(pixels, processor), grid, key)


def empty_picture(processor: Processor) -> Image:
    """One merged token of zeros, for a rank that has no picture while others encode theirs."""
    return Image(torch.zeros(MERGE**2, processor.patch_values), (MERGE, MERGE), "no picture")


def image_tokens(
    data: bytes,
    min_pixels: int = MIN_PIXELS,
    max_pixels: int = MAX_PIXELS,
    processor: Processor = QWEN2_5_VL,
) -> int:
    """How many tokens `load_image` would make of a picture file, by its header alone; 0 for a file that it refuses."""
    try:
        width, height = stored_size(data)
        height, width = smart_resize(height, width, min_pixels, max_pixels, processor.side)
    except ValueError:
        return 0
    return height * width // processor.side**2


def smart_resize(
    height: int,
    width: int,
    min_pixels: int,
    max_pixels: int,
    side: int = QWEN2_5_VL.side,
) -> tuple[int, int]:
    """Height and width as multiples of `side`, their product within the limits, the aspect nearly kept.

    The image processor's function of this name. Raises ValueError when one side is more than 200 times the other.
    """
    check_aspect(width, height)
    # Python's round takes halves to the even neighbour, and so did Qwen2-VL's training.
    new_height = round(height / side) * side
    new_width = round(width / side) * side
    if new_height * new_width > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        new_height = math.floor(height / shrink / side) * side
        new_width = math.floor(width / shrink / side) * side
        new_height = max(side, new_height)
        new_width = max(side, new_width)
    elif new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * grow / side) * side
        new_width = math.ceil(width * grow / side) * side
    return new_height, new_width


def patchify(pixels: np.ndarray, processor: Processor = QWEN2_5_VL) -> Tensor:
    """RGB bytes (h, w, 3) to normalised patches (P, 1176), merged tokens in reading order (see the top of this file).

    The image processor's function of this name, after its `rescale` and `normalize`. The numbers in the comments are
    Qwen2.5-VL's. Raises ValueError unless both sides are multiples of `processor.side`.
    """
    height, width, _ = pixels.shape
    side = processor.side
    patch = processor.patch
    if height % side or width % side:
        raise ValueError(f"picture of {width} x {height} pixels: both sides must be multiples of {side}")
    rows = height // side  # of merged tokens
    columns = width // side
    values = processor.normalised[pixels, np.arange(CHANNELS)]  # (h, w, 3)
    values = values.reshape(rows, MERGE, patch, columns, MERGE, patch, CHANNELS)
    # From (row, patch row, pixel row, column, patch column, pixel column, channel).
    values = values.transpose(0, 3, 1, 4, 6, 2, 5)  # (rows, columns, 2, 2, channel, 14, 14)
    values = np.expand_dims(values, 5)  # (rows, columns, 2, 2, channel, 1, 14, 14)
    frames = np.repeat(values, FRAMES, axis=5)  # (rows, columns, 2, 2, channel, 2, 14, 14)
    patches = frames.reshape(-1, processor.patch_values)  # (P, 1176)
    return torch.from_numpy(patches)


# ---- what the tower shares with the decoder


@lru_cache
def inverse_frequencies(size: int, theta: float, device: torch.device) -> Tensor:
    """theta^(-2i/size) for i < size / 2, fp32. Computed on the CPU, so that every device turns by the same angles.

    Not a module buffer: a model that is built on the meta device would leave it behind, and `model.to(bfloat16)` would
    round it.
    """
    even = torch.arange(0, size, 2, dtype=torch.float32, device="cpu")  # (size / 2,)
    frequencies = 1.0 / theta ** (even / size)  # (size / 2,)
    return frequencies.to(device)


@fused
def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (N, H, D): pairs (i, i + D/2) turn by the angles of cos and sin (N, 1, D/2).

    cos and sin in fp32 make the rotation itself fp32: the tower wants that, the decoder does not.
    """
    first, second = x.chunk(2, -1)  # (N, H, D/2) each
    turned_first = first * cos - second * sin
    turned_second = second * cos + first * sin
    turned = torch.cat((turned_first, turned_second), -1)  # (N, H, D)
    return turned.to(x.dtype)


def project(x: Tensor, *layers: nn.Linear) -> Sequence[Tensor]:
    """layer(x), (N, out), of each of some layers with the same input x (N, in).

    A model that samples with adapters computes them together: `lora.Stack`.
    """
    stack = getattr(layers[0], "stack", None)
    if stack is None:
        return [layer(x) for layer in layers]
    return stack(x)


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
        gate, up = project(x, self.gate_proj, self.up_proj)  # (N, intermediate) each
        return self.down_proj(gated(gate, up))  # (N, size)


def run_block(block: nn.Module, recompute: bool, *args) -> Tensor:
    """block(*args). With `recompute` only its inputs are kept, and the backward pass runs it again."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False)  # nothing random in a block
    return block(*args)


# ---- the tower


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of the tower. Names and defaults are the checkpoints'."""

    processor: ClassVar[Processor] = QWEN2_5_VL
    hidden_act: ClassVar[str] = "silu"
    mlp_rows: ClassVar[int] = 3  # as wide as the MLP, that its backward pass needs: gate, up and their product

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

    @property
    def feature_size(self) -> int:
        """Numbers that the tower gives for a merged token."""
        return self.out_hidden_size


def patch_positions(grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Row and column of each patch of a picture, (M, 4) each: in stored order, by merged tokens."""
    rows = grid[0] // MERGE
    columns = grid[1] // MERGE
    token_row = torch.arange(rows).repeat_interleave(columns)  # (M,) 0 0 0 1 1 1
    token_column = torch.arange(columns).repeat(rows)  # (M,) 0 1 2 0 1 2
    patch_row = torch.tensor([0, 0, 1, 1])  # within a merged token
    patch_column = torch.tensor([0, 1, 0, 1])
    row = token_row[:, None] * MERGE + patch_row  # (M, 4)
    column = token_column[:, None] * MERGE + patch_column  # (M, 4)
    return row, column


def rotary_angles(row: Tensor, column: Tensor, head_dim: int) -> Tensor:
    """Rotary angles (P, D/2), fp32, of patches at `row` and `column` (P,): half the pairs turn with each."""
    frequencies = inverse_frequencies(head_dim // 2, 10_000.0, torch.device("cpu"))  # (D/4,)
    row_angles = row[:, None] * frequencies  # (P, D/4)
    column_angles = column[:, None] * frequencies  # (P, D/4)
    return torch.cat([row_angles, column_angles], 1)


@dataclass(frozen=True)
class WindowOrder:
    """How one picture's merged tokens are reordered so that each window is a run of neighbours."""

    order: Tensor  # (M,) long: which token comes at this place
    lens: tuple[int, ...]  # patches in each window
    angles: Tensor  # (P, D/2) fp32: rotary angles of the patches in that order, the row's first, then the column's


@lru_cache(maxsize=512)
def window_order(
    grid: tuple[int, int],
    window: int,
    head_dim: int,
) -> WindowOrder:
    """`grid` in patches, `window` in merged tokens along a side. Windows at the right and the bottom may be smaller.

    transformers' `get_vision_window_index` and `get_vision_position_ids` for one picture.
    """
    row, column = patch_positions(grid)  # (M, 4) each
    window_row = row[:, 0] // MERGE // window  # (M,)
    window_column = column[:, 0] // MERGE // window  # (M,)
    number = window_row * grid[1] + window_column  # (M,) the window of each token, numbered in reading order
    order = number.argsort(stable=True)  # (M,)
    _, tokens_in_window = number[order].unique_consecutive(return_counts=True)  # (windows,)
    lens = tokens_in_window * MERGE**2
    angles = rotary_angles(row[order].flatten(), column[order].flatten(), head_dim)  # (P, D/2)
    return WindowOrder(order, tuple(lens.tolist()), angles)


class VisionAttention(nn.Module):
    def __init__(self, size: int, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self.qkv = nn.Linear(size, 3 * size)
        self.proj = nn.Linear(size, size)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        segments: Segments,
    ) -> Tensor:
        qkv = self.qkv(x)  # (P, 3 d)
        qkv = qkv.unflatten(-1, (3, -1, self.head_dim))  # (P, 3, H, D)
        q, k, v = qkv.unbind(1)  # (P, H, D) each
        q = rotate(q, cos, sin)
        k = rotate(k, cos, sin)
        out = packed_attention(q, k, v, segments)  # (P, H, D)
        return self.proj(out.flatten(1))  # (P, d)


class VisionBlock(nn.Module):
    def __init__(self, size: int, head_dim: int, norm: type[nn.Module], mlp: nn.Module):
        super().__init__()
        self.norm1 = norm(size, eps=1e-6)
        self.norm2 = norm(size, eps=1e-6)
        self.attn = VisionAttention(size, head_dim)
        self.mlp = mlp

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        segments: Segments,
    ) -> Tensor:
        normed = self.norm1(x)
        x = x + self.attn(normed, cos, sin, segments)
        normed = self.norm2(x)
        return x + self.mlp(normed)


class PatchEmbed(nn.Module):
    def __init__(self, size: int, processor: Processor, bias: bool):
        super().__init__()
        shape = (FRAMES, processor.patch, processor.patch)
        # A convolution because the checkpoint's weight has that shape.
        self.proj = nn.Conv3d(
            CHANNELS,
            size,
            kernel_size=shape,
            stride=shape,
            bias=bias,
        )

    def forward(self, patches: Tensor) -> Tensor:
        """(P, 1176) to (P, d). The kernel covers a patch exactly, so the convolution is one matrix product."""
        weight = self.proj.weight.flatten(1)  # (d, 1176)
        return F.linear(patches.to(weight.dtype), weight, self.proj.bias)


class PatchMerger(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        merged = config.hidden_size * MERGE**2
        self.ln_q = nn.RMSNorm(config.hidden_size, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(merged, merged),
            nn.GELU(),
            nn.Linear(merged, config.out_hidden_size),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(P, d) to (M, out_hidden_size)."""
        x = self.ln_q(x)  # (P, d)
        x = x.unflatten(0, (-1, MERGE**2))  # (M, 4, d)
        x = x.flatten(1)  # (M, 4 d)
        return self.mlp(x)


class VisionTower(nn.Module):
    """Qwen2.5-VL's vision encoder. Set `checkpoint_blocks` to trade a second forward pass for activation memory.

    Windowed attention, in its plain form, is attention over all patches with a mask (P, P) that is true where two
    patches are in the same window. Here tokens are reordered so that a window is a run of neighbours, and each run is
    a segment of `packed_attention`: the same numbers, without the products that the mask would throw away.
    """

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.checkpoint_blocks = False
        self.patch_embed = PatchEmbed(config.hidden_size, config.processor, bias=False)
        self.blocks = nn.ModuleList()
        for _ in range(config.depth):
            mlp = MLP(config.hidden_size, config.intermediate_size, bias=True)
            self.blocks.append(VisionBlock(config.hidden_size, config.head_dim, nn.RMSNorm, mlp))
        self.merger = PatchMerger(config)

    def forward(self, images: Sequence[Image]) -> Tensor:
        """Features (M, out_hidden_size) of at least one picture, `image.tokens` rows each, in the order given."""
        device = self.patch_embed.proj.weight.device
        window = self.config.window_size // self.config.processor.side
        layouts = []
        for image in images:
            layout = window_order(image.grid, window, self.config.head_dim)
            layouts.append(layout)
        order = _joined_order(layouts).to(device)  # (M,)
        angles = torch.cat([layout.angles for layout in layouts])  # (P, D/2)
        angles = angles.to(device)
        cos = angles.cos()[:, None]  # (P, 1, D/2)
        sin = angles.sin()[:, None]  # (P, 1, D/2)
        window_lens = [length for layout in layouts for length in layout.lens]
        windows = apart(window_lens, device)
        picture_lens = [len(image.patches) for image in images]
        pictures = apart(picture_lens, device)

        patches = torch.cat([image.patches for image in images])  # (P, 1176)
        hidden = self.patch_embed(patches.to(device))  # (P, d)
        hidden = hidden.unflatten(0, (-1, MERGE**2))  # (M, 4, d)
        hidden = hidden[order].flatten(0, 1)  # (P, d), window by window
        for i, block in enumerate(self.blocks):
            segments = pictures if i in self.config.fullatt_block_indexes else windows
            hidden = run_block(block, self.checkpoint_blocks, hidden, cos, sin, segments)
        features = self.merger(hidden)  # (M, out_hidden_size), window by window
        return features[order.argsort()]  # in reading order


def _joined_order(layouts: Sequence[WindowOrder]) -> Tensor:
    """The orders of some pictures as one (M,), counting tokens from the first picture's first."""
    orders = []
    first = 0
    for layout in layouts:
        orders.append(layout.order + first)
        first += len(layout.order)
    return torch.cat(orders)


def apart(lens: Sequence[int], device: torch.device) -> Segments:
    """Segments that attend each to itself alone, without a causal mask."""
    return Segments.of(lens, lens, causal=False, device=device)
