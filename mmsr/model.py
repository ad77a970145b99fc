"""Qwen2.5-VL: the decoder, M-RoPE positions, log-probabilities, and Hugging Face folders in and out.

One code path serves sampling, training and the reference. Sequences are packed along one token axis; what sees what is
the caller's `attend` (attention.py), so the same forward pass runs whole sequences, groups that share a prompt, and
decoding from a cache. Weight names are those of the published checkpoints.

Shape letters: N packed tokens, M image tokens, R rows to score, H query heads, K key/value heads, D head size,
d hidden size, V vocabulary.
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Callable, Iterator, Sequence

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .attention import Attend
from .episode import UserError, first_line
from .vision import (
    CHANNELS,
    FRAMES,
    MERGE,
    MLP,
    PATCH,
    SIDE,
    Image,
    VisionConfig,
    VisionTower,
    inverse_frequencies,
    rotate,
    run_block,
)
from .weights import (
    Bounds,
    check_bounds,
    fitting,
    flag,
    headers,
    own_head,
    read_object,
    refuse_adapter,
    refuse_others,
    refuse_quantised_config,
    section,
    tensors,
)

BANNED_LOGIT = -1e9  # its probability is exactly 0; with -inf, entropy and its gradient would be NaN
TILE = 12 * 2**20  # logits at a time on the CPU: 82 rows of the real vocabulary
TILE_BYTES = 2**30  # on CUDA, of everything that a tile takes: a thousand rows, as each product reads the whole head
SHARD_BYTES = 5 * 10**9
SIDE_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template.json", "chat_template.jinja"),
    *("preprocessor_config.json", "generation_config.json"),
)
SHORT_NAMES = {f"Qwen2.5-VL-{size}B": f"Qwen/Qwen2.5-VL-{size}B-Instruct" for size in (3, 7, 32, 72)}


# ---- configuration

# Of each key: kind of number, least, most. One that is absent or null has its default.
BOUNDS: dict[str, Bounds] = {
    "vocab_size": (int, 1, 2**24),
    "hidden_size": (int, 1, 2**20),
    "intermediate_size": (int, 1, 2**20),
    "num_hidden_layers": (int, 1, 1024),
    "num_attention_heads": (int, 1, 2**20),
    "num_key_value_heads": (int, 1, 2**20),
    "rms_norm_eps": (float, 1e-12, 0.1),
    "rope_theta": (float, 1, 1e12),
    "mrope_section": (tuple, 0, 2**20),
    "max_position_embeddings": (int, 1, 2**31),
    "image_token_id": (int, 0, 2**24),
    "video_token_id": (int, 0, 2**24),
    "vision_start_token_id": (int, 0, 2**24),
    "vision_end_token_id": (int, 0, 2**24),
}
VISION_BOUNDS: dict[str, Bounds] = {
    "depth": (int, 1, 1024),
    "hidden_size": (int, 1, 2**20),
    "intermediate_size": (int, 1, 2**20),
    "num_heads": (int, 1, 2**20),
    "out_hidden_size": (int, 1, 2**20),
    "window_size": (int, 1, 2**20),
    "fullatt_block_indexes": (tuple, 0, 1024),
}


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

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """Reads the hub's flat form and transformers 5's nested one. Raises ValueError on what is not built here."""
        if values.get("model_type") != "qwen2_5_vl":
            raise ValueError(f"model_type is {values.get('model_type')!r:.40}, this program runs 'qwen2_5_vl' only")
        vision, text = section(values, "vision_config"), section(values, "text_config")
        flat = {**values, **text}
        scaling, parameters = section(flat, "rope_scaling"), section(flat, "rope_parameters")
        rope = scaling or parameters
        flat |= {key: rope[key] for key in ("mrope_section", "rope_theta") if rope.get(key) is not None}
        # Files written before transformers 5 may have the flag in text_config alone, beside a default False outside.
        flat["tie_word_embeddings"] = flag(values, "tie_word_embeddings") or flag(flat, "tie_word_embeddings")
        if flat.get("num_key_value_heads", 0) is None:  # written out as null, and not left out: one for each query head
            flat["num_key_value_heads"] = flat.get("num_attention_heads")
        check_bounds(flat, BOUNDS, "")
        check_bounds(vision, VISION_BOUNDS, "vision_config.")
        config = cls(**_known(cls, flat), vision=VisionConfig(**_known(VisionConfig, vision)))
        _refuse_variants(flat, (scaling, parameters), vision, config.head_dim)
        return config

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


def _known(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    """The entries of `values` that `cls` has a field for; lists become tuples, None means the default."""
    names = {f.name for f in fields(cls)}
    chosen = {key: value for key, value in values.items() if key in names and value is not None}
    return {key: tuple(value) if isinstance(value, list) else value for key, value in chosen.items()}


def _refuse_variants(text: dict[str, Any], ropes: Sequence[dict], vision: dict[str, Any], head_dim: int) -> None:
    """A setting that would silently compute something else than the checkpoint means."""
    wanted = [
        ("hidden_act", text.get("hidden_act"), ("silu",)),
        ("head_dim", text.get("head_dim"), (head_dim,)),
        ("use_sliding_window", text.get("use_sliding_window"), (False,)),
        *(("layer_types", kind, ("full_attention",)) for kind in _items(text.get("layer_types"))),
        *(("rope type", rope.get(key), ("default", "mrope")) for rope in ropes for key in ("type", "rope_type")),
        *(("partial_rotary_factor", part.get("partial_rotary_factor"), (1,)) for part in (text, *ropes)),
        ("vision_config.hidden_act", vision.get("hidden_act"), ("silu",)),
        ("vision_config.in_channels", vision.get("in_channels", vision.get("in_chans")), (CHANNELS,)),
        ("vision_config.patch_size", vision.get("patch_size"), (PATCH,)),
        ("vision_config.spatial_merge_size", vision.get("spatial_merge_size"), (MERGE,)),
        ("vision_config.temporal_patch_size", vision.get("temporal_patch_size"), (FRAMES,)),
    ]
    for name, found, allowed in wanted:
        if found is not None and found not in allowed:
            raise ValueError(f"{name} is {found!r:.40}, this program runs {' or '.join(map(repr, allowed))} only")


def _items(value: Any) -> list[Any]:
    """A list, or what stands in place of one."""
    return value if isinstance(value, list) else [value]


def _refuse_contradictions(config: ModelConfig) -> None:
    """ValueError for sizes of config.json that do not fit each other."""
    c, vision = config, config.vision
    ids = (c.image_token_id, c.video_token_id, c.vision_start_token_id, c.vision_end_token_id)
    thirds = len(c.mrope_section) == 3 and 2 * sum(c.mrope_section) == c.head_dim
    rules = [
        (c.hidden_size % c.num_attention_heads == 0, "num_attention_heads must divide hidden_size"),
        (c.num_attention_heads % c.num_key_value_heads == 0, "num_key_value_heads must divide num_attention_heads"),
        (thirds, f"mrope_section must be three numbers with the sum {c.head_dim / 2:g}, half a head"),
        (max(ids) < c.vocab_size, f"image, video and vision token ids {ids} must be below vocab_size {c.vocab_size}"),
        (len(set(ids)) == len(ids), f"image, video and vision token ids {ids} must differ"),
        (vision.hidden_size % (4 * vision.num_heads) == 0, "vision_config: 4 * num_heads must divide hidden_size"),
        (vision.out_hidden_size == c.hidden_size, "vision_config.out_hidden_size must be hidden_size"),
        (vision.window_size % SIDE == 0, f"vision_config.window_size must be a multiple of {SIDE}"),
    ]
    for holds, rule in rules:
        if not holds:
            raise ValueError(rule)


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

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend, layer: int) -> Tensor:
        heads = (-1, self.head_dim)
        q = rotate(self.q_proj(x).unflatten(-1, heads), cos, sin)  # (N, H, D)
        k = rotate(self.k_proj(x).unflatten(-1, heads), cos, sin)  # (N, K, D)
        v = self.v_proj(x).unflatten(-1, heads)
        return self.o_proj(attend(layer, q, k, v).flatten(1))


class DecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.self_attn = SelfAttention(config)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, bias=False)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend, layer: int) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend, layer)
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
        attend: Attend,
        image_features: Tensor | None = None,
        image_index: Tensor | None = None,
        read: Callable[[Tensor, Tensor], Any] | None = None,
    ) -> Any:
        """Hidden states (N, d) after the final norm of tokens `input_ids` (N,) at `position_ids` (3, N).

        `image_features` (M, d) take the places `image_index` (M,) of the packed axis. With `read`, the value is
        read(hidden, head weight (V, d)), called in here because only here does FSDP hold the head in one piece.
        """
        hidden = self.model.embed_tokens(input_ids)
        if image_features is not None:
            hidden = hidden.index_copy(0, image_index, image_features.to(hidden.dtype))
        # Angles need fp32 (positions run to thousands); the rotation itself is done in the model's precision.
        cos, sin = (x.to(hidden.dtype) for x in rotary(position_ids, self.config))
        for index, layer in enumerate(self.model.layers):
            recompute = self.checkpoint_blocks and index < self.config.num_hidden_layers - self.kept_blocks
            hidden = run_block(layer, recompute, hidden, cos, sin, attend, index)
        hidden = self.model.norm(hidden)
        return hidden if read is None else read(hidden, self.head_weight)


# ---- log-probabilities: the one place where engine, trainer and reference get them


def logits(hidden: Tensor, head: Tensor, temperature: float = 1.0, banned: Tensor | None = None) -> Tensor:
    """fp32 logits (R, V) of hidden (R, d) and head (V, d), over the temperature. `banned` (V,) bool: probability 0."""
    values = _scores(hidden, head)
    if temperature != 1:
        values.div_(temperature)
    return values if banned is None else values.masked_fill_(banned, BANNED_LOGIT)


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
    hidden: Tensor, head: Tensor, targets: Tensor, temperature: float = 1.0, banned: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """log p(target) (R,) and entropy in nats (R,), fp32, from hidden (R, d), head (V, d), targets (R,).

    The entropy carries no gradient. Only some rows of logits exist at a time, in the backward pass too, which makes
    them again: the memory of two tiles in all.
    """
    return _LogProbs.apply(hidden, head, targets, temperature, banned)


class _LogProbs(torch.autograd.Function):
    """`log_probs`. Its own backward pass, so that half-precision rows add up their gradient of the head in fp32."""

    @staticmethod
    def forward(ctx, hidden: Tensor, head: Tensor, targets: Tensor, temperature: float, banned: Tensor | None):
        ctx.save_for_backward(hidden, head, targets, banned)
        ctx.temperature = temperature
        tile, part = _tile_rows(hidden, head)
        found = [
            _tile_log_probs(logits(rows, head, temperature, banned), wanted, part)
            for rows, wanted in _tiles(tile, hidden, targets)
        ]
        logps, entropy = (torch.cat(values) for values in zip(*found))
        ctx.mark_non_differentiable(entropy)
        return logps, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor, _: Tensor):
        hidden, head, targets, banned = ctx.saved_tensors
        to_hidden = torch.empty_like(hidden)
        to_head = torch.zeros_like(head, dtype=torch.float32)
        tile, part = _tile_rows(hidden, head)
        for rows, wanted, scale, out in reversed(_tiles(tile, hidden, targets, gradient[:, None], to_hidden)):
            scores = logits(rows, head, ctx.temperature, banned)
            slopes = _tile_slopes(scores, wanted, scale, part, ctx.temperature, banned).to(rows.dtype)
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
    scores: Tensor, targets: Tensor, scale: Tensor, part: int, temperature: float, banned: Tensor | None
) -> Tensor:
    """Gradient (R, V), fp32, of Σ scale · log p(target) with respect to hidden @ head.T; scale (R, 1).

    It takes the place of `scores`, the tile's `logits`, `part` rows at a time.
    """
    for some, wanted, each in _tiles(part, scores, targets, scale):
        every = some.log_softmax(-1)
        slope = torch.zeros_like(every).scatter_(1, wanted[:, None], each)
        slope = torch.ops.aten._log_softmax_backward_data(slope, every, -1, slope.dtype)
        if banned is not None:
            slope.masked_fill_(banned, 0)
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


# ---- folders


def resolve(name: str) -> Path:
    """The folder that `--model NAME` means: a folder, a short name such as Qwen2.5-VL-7B, or a hub id.

    The latter two are fetched unless they lie in the hub's cache. Raises UserError when they cannot be.
    """
    if Path(name).is_dir():
        return Path(name)
    repository = SHORT_NAMES.get(name, name)
    return fetched(
        "snapshot_download", f"model {name!r} is not a folder, and {repository!r}",
        "check the name and the network, or pass a local folder",
        repo_id=repository, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"],
    )  # fmt: skip


def fetched(function: str, what: str, advice: str, **where: Any) -> Path:
    """What a function of huggingface_hub's fetches, or finds in its cache. UserError "what … : advice" where it fails.

    The hub's own settings hold: HF_HOME, HF_HUB_OFFLINE, HF_TOKEN, HF_ENDPOINT.
    """
    import huggingface_hub  # slow to import, and not needed for files that are here

    try:
        return Path(getattr(huggingface_hub, function)(**where))
    except Exception as error:  # of the hub's client, its HTTP library or the file system
        raise UserError(
            f"{what} could not be fetched from the Hugging Face hub ({first_line(error)}): {advice}"
        ) from error


def load(folder: Path | str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Qwen2_5_VL:
    """The model of a Hugging Face folder, its weights cast to `dtype` on `device`. Raises UserError for a folder unfit.

    Tensors are read and cast one by one and become the parameters themselves, so memory never holds a second copy.
    """
    model = skeleton(folder)
    # A copy even where nothing changes: the tensor read is a view of the file, which may be overwritten.
    weights = {name: tensor.to(device, dtype, copy=True) for name, tensor in stored_weights(folder, model)}
    model.load_state_dict(weights, assign=True)
    return model


def skeleton(folder: Path | str) -> Qwen2_5_VL:
    """The model of a Hugging Face folder on the meta device: without weights, which are looked at by their headers.

    Raises UserError for a folder that `load` would refuse, but for NaN. Where config.json ties the head to the
    embedding and a head is stored that differs, the head is the model's own, as in transformers.
    """
    folder = Path(folder)
    config, found = read_config(folder), headers(folder)
    if config.tie_word_embeddings and own_head(found):
        config = replace(config, tie_word_embeddings=False)
    with torch.device("meta"):
        model = Qwen2_5_VL(config)
    fitting(folder, found, _shapes(model))
    refuse_others(folder, found, _shapes(model))
    return model


def stored_weights(folder: Path | str, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of each parameter of `model`, one at a time; what else the folder holds is left alone.

    Raises UserError for one missing or misshapen, or with NaN or infinite numbers.
    """
    folder = Path(folder)
    yield from tensors(fitting(folder, headers(folder), _shapes(model)))


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def read_config(folder: Path | str) -> ModelConfig:
    """The ModelConfig of a Hugging Face folder. Raises UserError for none, and for a model that is not built here."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"model folder {folder} does not exist: pass a Hugging Face model folder or a hub id")
    refuse_adapter(folder)
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"model folder {folder} has no config.json: is it a Hugging Face model folder?")
    values = read_object(file)
    refuse_quantised_config(folder, values)
    try:
        config = ModelConfig.from_dict(values)
        _refuse_contradictions(config)
        return config
    except (ValueError, TypeError) as error:
        raise UserError(f"{file}: {first_line(error)}: pass a Qwen2.5-VL model") from error


def save(model: Qwen2_5_VL, folder: Path | str, tokenizer_files_from: Path | str | None = None) -> None:
    """Write a Hugging Face folder: config.json, weights in the model's own precision, and copies of tokenizer files."""
    save_weights(model.config, model.state_dict(), folder, tokenizer_files_from)


def save_weights(
    config: ModelConfig,
    weights: dict[str, Tensor],
    folder: Path | str,
    tokenizer_files_from: Path | str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """`save` for weights by name, such as a sharded model's gathered state dict.

    Every file is written under a temporary name and then renamed, weights before the config that makes them loadable.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write_weights(weights, folder, shard_bytes)
    _copy_side_files(tokenizer_files_from, folder)
    dtype = next(iter(weights.values())).dtype
    _write_json(folder / "config.json", {**config.to_dict(), "torch_dtype": str(dtype).removeprefix("torch.")})


def _write_weights(weights: dict[str, Tensor], folder: Path, shard_bytes: int) -> None:
    stale = set(folder.glob("model*.safetensors*"))
    shards = _shards(weights, shard_bytes)
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = ["model.safetensors"]
    for name, shard in zip(names, shards):
        with _replacing(folder / name) as temporary:
            save_file(shard, temporary, metadata={"format": "pt"})
    if len(shards) > 1:
        weight_map = {weight: name for name, shard in zip(names, shards) for weight in shard}
        size = sum(tensor.nbytes for tensor in weights.values())
        names.append("model.safetensors.index.json")
        _write_json(folder / names[-1], {"metadata": {"total_size": size}, "weight_map": weight_map})
    for file in stale - {folder / name for name in names}:
        file.unlink()  # of an earlier save: it would be read in place of these


def _shards(weights: dict[str, Tensor], limit: int) -> list[dict[str, Tensor]]:
    """Cut by order into parts of at most `limit` bytes, a tensor larger than that alone in its part."""
    shards: list[dict[str, Tensor]] = [{}]
    used = 0
    for name, tensor in weights.items():
        if shards[-1] and used + tensor.nbytes > limit:
            shards.append({})
            used = 0
        shards[-1][name] = tensor.detach().contiguous()
        used += tensor.nbytes
    return shards


def _copy_side_files(source: Path | str | None, folder: Path) -> None:
    if source is None or Path(source).resolve() == folder.resolve():
        return
    for name in SIDE_FILES:
        if (Path(source) / name).is_file():
            with _replacing(folder / name) as temporary:
                shutil.copyfile(Path(source) / name, temporary)


def _write_json(file: Path, value: dict[str, Any]) -> None:
    with _replacing(file) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


@contextmanager
def _replacing(file: Path) -> Iterator[Path]:
    """A temporary path to write, which then takes the place of `file`."""
    temporary = file.with_name(f".{file.name}.tmp")
    yield temporary
    os.replace(temporary, file)
