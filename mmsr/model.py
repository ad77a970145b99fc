"""Qwen2.5-VL: the decoder, M-RoPE positions, logits and log-probabilities. Qwen3-VL, in qwen3_vl.py, shares most of it.

A decoder block is the usual one: RMSNorm, attention with grouped key/value heads and rotary positions, RMSNorm, SwiGLU
(arXiv 2502.13923, section 2.1). Only the positions are unusual: each token has three, time, row and column.

There is no batch axis. Sequences are packed one after another along a single token axis, and which token attends to
which is decided by the caller's `attention_fn` (attention.py). So one forward pass serves training on whole sequences,
training on groups that share a prompt, and decoding from a cache. Weights have the names of the published checkpoints.

Shape letters: N packed tokens, M image tokens, R rows to score, H query heads, K key/value heads, D head size,
d hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Callable, ClassVar, Sequence

import torch
from torch import Tensor, nn

from mmsr.attention import AttentionFn
from mmsr.vision import (
    FRAMES,
    MERGE,
    MLP,
    Image,
    VisionConfig,
    VisionTower,
    inverse_frequencies,
    project,
    rotate,
    run_block,
)

SUPPRESSED_LOGIT = -1e9  # its probability is exactly 0; with -inf, entropy and its gradient would be NaN


# ---- configuration


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and token ids, by the names of config.json. Defaults, for keys that a file lacks, are transformers' own."""

    model_type: ClassVar[str] = "qwen2_5_vl"
    head_norms: ClassVar[bool] = False  # whether queries and keys pass a norm
    nested_names: ClassVar[bool] = False  # whether weights are stored as `model.language_model.*`, `model.visual.*`

    # the decoder
    vocab_size: int = 152064
    hidden_size: int = 8192
    intermediate_size: int = 29568
    num_hidden_layers: int = 80
    num_attention_heads: int = 64
    num_key_value_heads: int = 8
    rms_norm_eps: float = 1e-5

    # positions
    rope_theta: float = 1_000_000.0
    mrope_section: tuple[int, ...] = (16, 24, 24)  # how many rotary frequencies turn with time, row and column

    # not used here: other programs that open a saved folder read them
    max_position_embeddings: int = 32768
    bos_token_id: int = 151643
    eos_token_id: int = 151645

    tie_word_embeddings: bool = False  # the output head is the embedding

    # tokens that mark a picture
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653

    vision: VisionConfig = field(default_factory=VisionConfig)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def build(self) -> VLModel:
        """The model of these sizes. Its weights are still to be set: `random_model` or pretrained/load.py."""
        return Qwen2_5_VL(self)

    def to_dict(self) -> dict[str, Any]:
        """The values of config.json in the hub's flat form, which every inference program reads."""
        values = asdict(self)
        values["rope_scaling"] = {"type": "mrope", "mrope_section": values.pop("mrope_section")}
        vision = values.pop("vision")
        vision |= {
            "patch_size": self.vision.processor.patch,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": FRAMES,
        }
        return {
            "architectures": ["Qwen2_5_VLForConditionalGeneration"],
            "model_type": self.model_type,
            "hidden_act": "silu",
            **values,
            "vision_config": vision,
        }


# ---- positions


def mrope_positions(
    length: int,
    images: Sequence[tuple[int, tuple[int, int]]],
    start: int = 0,
) -> tuple[Tensor, int]:
    """M-RoPE positions (3, length) of a stretch of tokens, and the position at which the next stretch starts.

    A text token advances time, row and column together. The tokens of a picture share one time, and have their row and
    column in the picture. The text after a picture continues at the largest position used + 1. Two words, a picture of
    2 x 3 tokens (4 x 6 patches) and two more words, `mrope_positions(10, [(2, (4, 6))])`:

              word word | picture             | word word
        time     0    1 |  2  2  2   2  2  2  |    5    6
        row      0    1 |  2  2  2   3  3  3  |    5    6
        column   0    1 |  2  3  4   2  3  4  |    5    6      and the next stretch starts at 7

    `images` has (index of the picture's first token in the stretch, (rows, columns) in patches), in order. Token ids
    play no role. Raises ValueError for pictures that do not fit.
    """
    pieces = []  # (3, tokens) each
    done = 0  # tokens that have positions
    position = start
    for offset, grid in images:
        rows = grid[0] // MERGE
        columns = grid[1] // MERGE
        end = offset + rows * columns
        if offset < done or end > length:
            raise ValueError(f"image tokens {offset}..{end} do not fit between token {done} and the end at {length}")
        pieces.append(_text_positions(position, offset - done))
        position += offset - done
        pieces.append(_image_positions(position, rows, columns))
        position += max(rows, columns)
        done = end
    pieces.append(_text_positions(position, length - done))
    position += length - done
    return torch.cat(pieces, 1), position


def _text_positions(first: int, count: int) -> Tensor:
    return torch.arange(first, first + count).expand(3, -1)  # (3, count)


def _image_positions(first: int, rows: int, columns: int) -> Tensor:
    row = torch.arange(rows).repeat_interleave(columns)  # (rows * columns,) 0 0 0 1 1 1
    column = torch.arange(columns).repeat(rows)  # (rows * columns,) 0 1 2 0 1 2
    time = torch.zeros_like(row)
    return first + torch.stack([time, row, column])  # (3, rows * columns)


def rotary(position_ids: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """cos and sin (N, 1, D/2), fp32, of the angles by which positions (3, N) turn queries and keys.

    Ordinary rotary embedding turns all D/2 pairs of a head by its position · frequency. Here the first 16 pairs
    (`mrope_section`) turn with time, the next 24 with the row, the last 24 with the column. For text the three are
    equal, so text is turned as usual.
    """
    frequencies = inverse_frequencies(config.head_dim, config.rope_theta, position_ids.device)  # (D/2,)
    angles = position_ids[:, :, None] * frequencies  # (3, N, D/2)
    first, middle, last = angles.split(config.mrope_section, -1)  # (3, N, 16), (3, N, 24), (3, N, 24)
    angles = torch.cat([first[0], middle[1], last[2]], -1)  # (N, D/2): of the time, the row, the column
    cos = angles.cos()[:, None]  # (N, 1, D/2)
    sin = angles.sin()[:, None]  # (N, 1, D/2)
    return cos, sin


# ---- the decoder


class SelfAttention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim = config.head_dim
        q_size = config.num_attention_heads * self.head_dim
        kv_size = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_size)
        self.k_proj = nn.Linear(config.hidden_size, kv_size)
        self.v_proj = nn.Linear(config.hidden_size, kv_size)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=False)

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
        q = q.unflatten(-1, heads)  # (N, H, D)
        k = k.unflatten(-1, heads)  # (N, K, D)
        v = v.unflatten(-1, heads)  # (N, K, D)
        q = rotate(q, cos, sin)
        k = rotate(k, cos, sin)
        out = attention_fn(layer, q, k, v)  # (N, H, D)
        return self.o_proj(out.flatten(1))  # (N, d)


class DecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig, attention: nn.Module):
        super().__init__()
        self.self_attn = attention
        self.mlp = MLP(config.hidden_size, config.intermediate_size, bias=False)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        attention_fn: AttentionFn,
        layer: int,
    ) -> Tensor:
        normed = self.input_layernorm(x)
        x = x + self.self_attn(normed, cos, sin, attention_fn, layer)
        normed = self.post_attention_layernorm(x)
        return x + self.mlp(normed)


class Decoder(nn.Module):
    """Holds the weights under the checkpoints' names `model.*`. The model's `forward` runs them."""

    def __init__(self, config: ModelConfig, attention: type[nn.Module]):
        """`attention`: the class of a block's attention."""
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        layers = [DecoderLayer(config, attention(config)) for _ in range(config.num_hidden_layers)]
        self.layers = nn.ModuleList(layers)
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class VLModel(nn.Module):
    """What the rest of the program knows of a model, whatever its family: these attributes, and `forward`.

    With `checkpoint_blocks` the backward pass recomputes decoder blocks instead of keeping their activations, all but
    the last `kept_blocks`. Each of those costs memory and saves a block's forward pass. They are the last because the
    backward pass uses them first, and so frees their memory first. The vision tower, `visual`, has a switch of its own.
    """

    visual: Any  # the vision tower; `visual(images)` gives their features

    def __init__(self, config: ModelConfig, visual: nn.Module, decoder: Decoder):
        super().__init__()
        self.config = config
        self.checkpoint_blocks = False
        self.kept_blocks = 0
        self.visual = visual
        self.model = decoder
        if config.tie_word_embeddings:
            self.lm_head = None
        else:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head_weight(self) -> Tensor:
        """(V, d)"""
        if self.lm_head is None:
            return self.model.embed_tokens.weight
        return self.lm_head.weight

    def encode_images(self, images: Sequence[Image]) -> Tensor:
        """Features (M, f) of pictures, one picture after another: f numbers a merged token, `vision.feature_size`."""
        return self.visual(images)

    def recomputed_blocks(self) -> int:
        """How many blocks, the first ones, the backward pass computes again."""
        return self.config.num_hidden_layers - self.kept_blocks if self.checkpoint_blocks else 0

    def finish(self, hidden: Tensor, head_fn: Callable[[Tensor, Tensor], Any] | None) -> Any:
        """The final norm of hidden states (N, d), and what `head_fn` makes of them."""
        hidden = self.model.norm(hidden)
        return hidden if head_fn is None else head_fn(hidden, self.head_weight)


class Qwen2_5_VL(VLModel):
    def __init__(self, config: ModelConfig):
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

        `image_features` (M, d) replace the embeddings of the tokens `image_index` (M,). With `head_fn` the result is
        head_fn(hidden, head weight (V, d)); it is called in here because only here does FSDP hold the whole head.
        """
        hidden = self.model.embed_tokens(input_ids)  # (N, d)
        if image_features is not None:
            image_features = image_features.to(hidden.dtype)
            hidden = hidden.index_copy(0, image_index, image_features)
        # Angles need fp32 (positions run to thousands); the rotation itself is done in the model's precision.
        cos, sin = rotary(position_ids, self.config)  # (N, 1, D/2)
        cos = cos.to(hidden.dtype)
        sin = sin.to(hidden.dtype)
        recomputed = self.recomputed_blocks()
        for i, layer in enumerate(self.model.layers):
            hidden = run_block(layer, i < recomputed, hidden, cos, sin, attention_fn, i)
        return self.finish(hidden, head_fn)


# ---- logits and log-probabilities: engine, trainer and reference get them here and nowhere else


def logits(
    hidden: Tensor,
    head: Tensor,
    temperature: float = 1.0,
    suppressed: Tensor | None = None,
) -> Tensor:
    """hidden @ head.T / temperature: fp32 logits (R, V) of hidden (R, d) and head (V, d).

    `suppressed` (V,) bool: these ids get probability 0.
    """
    scores = _fp32_product(hidden, head)  # (R, V)
    if temperature != 1:
        scores.div_(temperature)
    if suppressed is not None:
        scores.masked_fill_(suppressed, SUPPRESSED_LOGIT)
    return scores


def _fp32_product(hidden: Tensor, head: Tensor) -> Tensor:
    """hidden @ head.T (R, V) in fp32.

    On CUDA half-precision factors give fp32 results: rounded to bfloat16, a logit near 30 is off by up to a sixteenth,
    and the sampler's and the trainer's log-probabilities would differ by as much. Other devices have no such product;
    in tests and plans the meta device is a GPU.
    """
    half_precision = hidden.dtype in (torch.bfloat16, torch.float16)
    gpu = hidden.device.type in ("cuda", "meta")
    if half_precision and gpu:
        return torch.mm(hidden, head.T, out_dtype=torch.float32)
    return (hidden @ head.T).float()


def log_probs(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    suppressed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """log p(target) (R,) and entropy in nats (R,), fp32, from hidden (R, d), head (V, d), targets (R,).

    The entropy carries no gradient. This is the plain form: all rows of logits are in memory at once. Training
    (update.py) calls `chunked_log_probs`, which gives the same numbers with some of the rows at a time.
    """
    scores = logits(hidden, head, temperature, suppressed)  # (R, V)
    log_p = scores.log_softmax(-1)  # (R, V)
    logps = log_p.gather(-1, targets[:, None])[:, 0]  # (R,)
    entropy = -(log_p.exp() * log_p).sum(-1)  # (R,)
    return logps, entropy.detach()


# ---- random weights


def random_model(
    config: ModelConfig,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> VLModel:
    """A model with random weights: matrices normal with standard deviation 0.02, norms 1, biases 0."""
    with torch.device("meta"):
        model = config.build().to(dtype)
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.02, generator=generator)
            elif name.endswith("weight"):
                parameter.fill_(1.0)
            else:
                parameter.fill_(0.0)
    return model
