"""Qwen2.5-VL from Hugging Face folders and back: what config.json may say, weights that fit, and what is refused.

Whatever would silently compute something else than the checkpoint means is refused before a weight is read.
"""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Iterator, Sequence

import torch
from torch import Tensor, nn

from mmsr.model import ModelConfig, Qwen2_5_VL
from mmsr.system.errors import UserError, first_line
from mmsr.system.export import SHARD_BYTES, write_folder
from mmsr.system.weights import (
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
from mmsr.vision import CHANNELS, FRAMES, MERGE, PATCH, SIDE, VisionConfig

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


# ---- folders


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
        config = model_config(values)
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
    """`save` for weights by name, such as a sharded model's gathered state dict."""
    dtype = next(iter(weights.values())).dtype
    values = {**config.to_dict(), "torch_dtype": str(dtype).removeprefix("torch.")}
    write_folder(Path(folder), values, weights, tokenizer_files_from, shard_bytes)


# ---- config.json


def model_config(values: dict[str, Any]) -> ModelConfig:
    """The ModelConfig that a config.json says, in the hub's flat form or in transformers 5's nested one.

    Raises ValueError on what is not built here.
    """
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
    config = ModelConfig(**_known(ModelConfig, flat), vision=VisionConfig(**_known(VisionConfig, vision)))
    _refuse_variants(flat, (scaling, parameters), vision, config.head_dim)
    return config


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
