"""config.json of a Hugging Face folder: which models it may describe, and what is refused.

A setting that this program does not build would load without an error and compute something else than the checkpoint
means. So every such setting is refused here, before a weight is read.
"""

from __future__ import annotations

import math
from dataclasses import fields
from itertools import chain
from pathlib import Path
from typing import Any, Iterator, Sequence

from mmsr.model import ModelConfig
from mmsr.pretrained.weights import read_object, refuse_adapter, refuse_quantised_config
from mmsr.qwen3_vl import Qwen3VisionConfig, Qwen3VLConfig
from mmsr.system.errors import UserError, first_line
from mmsr.vision import CHANNELS, FRAMES, MERGE, VisionConfig

# The families of models: the classes that hold the sizes of a model and of its tower.
FAMILIES: dict[str, tuple[type[ModelConfig], type]] = {
    "qwen2_5_vl": (ModelConfig, VisionConfig),
    "qwen3_vl": (Qwen3VLConfig, Qwen3VisionConfig),
}

Bounds = tuple[type, float, float]  # type (int, float, or tuple for a list of ints), smallest and largest value

# A key that is absent or null has its default.
BOUNDS: dict[str, Bounds] = {
    "vocab_size": (int, 1, 2**24),
    "hidden_size": (int, 1, 2**20),
    "intermediate_size": (int, 1, 2**20),
    "num_hidden_layers": (int, 1, 1024),
    "num_attention_heads": (int, 1, 2**20),
    "num_key_value_heads": (int, 1, 2**20),
    "head_dim": (int, 1, 2**20),
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
    "num_position_embeddings": (int, 1, 2**24),
    "deepstack_visual_indexes": (tuple, 0, 1024),
}


def read_config(folder: Path | str) -> ModelConfig:
    """The ModelConfig of a Hugging Face folder. Raises UserError if there is none, or the model is not built here."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"model folder {folder} does not exist: pass a Hugging Face model folder or a hub id")
    refuse_adapter(folder)
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"model folder {folder} has no config.json: is it a Hugging Face model folder?")
    values = read_object(file)
    if "model_type" not in values and (folder / "model").is_dir():
        raise UserError(f"{folder} is the folder of a run: give the model in it, {folder / 'model'}")
    if "model_type" not in values and (folder / "adapter").is_dir():
        advice = f"give that as --adapter {folder / 'adapter'}, with its base as --model"
        raise UserError(f"{folder} is the folder of a run that trained an adapter: {advice}")
    refuse_quantised_config(folder, values)
    try:
        config = model_config(values)
        _refuse_contradictions(config)
    except (ValueError, TypeError) as error:
        raise UserError(f"{file}: {first_line(error)}: pass a Qwen2.5-VL or Qwen3-VL model") from error
    _check_processor(folder / "preprocessor_config.json", config)
    return config


def _check_processor(file: Path, config: ModelConfig) -> None:
    """Raises UserError where the file, if there is one, prepares pictures in another way than is built here."""
    if not file.is_file():
        return
    values = read_object(file)
    processor = config.vision.processor
    built = {
        "patch_size": processor.patch,
        "merge_size": MERGE,
        "temporal_patch_size": FRAMES,
        "image_mean": list(processor.mean),
        "image_std": list(processor.std),
    }
    try:
        for name, ours in built.items():
            _refuse_unless(name, values.get(name), ours)
    except ValueError as error:
        raise UserError(f"{file}: {error}: take the file of the published checkpoint") from error


def model_config(values: dict[str, Any]) -> ModelConfig:
    """The ModelConfig that a config.json describes, in the hub's flat form or in transformers 5's nested one.

    Raises ValueError for what is not built here.
    """
    model_config_class, vision_config_class = _family(values.get("model_type"))
    vision = _section(values, "vision_config")
    text = _section(values, "text_config")
    flat = {**values, **text}
    scaling = _section(flat, "rope_scaling")
    parameters = _section(flat, "rope_parameters")
    rope = scaling or parameters
    for key in ("mrope_section", "rope_theta"):
        if rope.get(key) is not None:
            flat[key] = rope[key]
    # Files written before transformers 5 may have the flag in text_config alone, beside a default False outside.
    flat["tie_word_embeddings"] = _flag(values, "tie_word_embeddings") or _flag(flat, "tie_word_embeddings")
    if "num_key_value_heads" in flat and flat["num_key_value_heads"] is None:
        flat["num_key_value_heads"] = flat.get("num_attention_heads")  # null, unlike absent: one for each query head
    _check_bounds(flat, BOUNDS, "")
    _check_bounds(vision, VISION_BOUNDS, "vision_config.")
    tower = vision_config_class(**_known(vision_config_class, vision))
    config = model_config_class(**_known(model_config_class, flat), vision=tower)
    _refuse_variants(flat, (scaling, parameters), vision, config)
    return config


def _family(model_type: Any) -> tuple[type[ModelConfig], type]:
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    why = ", a mixture of experts" if model_type == "qwen3_vl_moe" else ""
    known = " and ".join(map(repr, FAMILIES))
    raise ValueError(f"model_type is {model_type!r:.40}{why}, this program runs {known} only")


def _section(values: dict[str, Any], name: str) -> dict[str, Any]:
    """An object within config.json; empty if it is absent or null."""
    found = values.get(name)
    if not isinstance(found, dict | None):
        raise ValueError(f"{name} is a JSON {type(found).__name__}, not an object")
    return found or {}


def _flag(values: dict[str, Any], name: str) -> bool:
    """True or false; false if it is absent or null."""
    value = values.get(name)
    if not isinstance(value, bool | None):
        raise ValueError(f"{name} is {value!r:.40}, not true or false")
    return bool(value)


def _known(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    """The entries of `values` that `cls` has a field for, without those that are None. Lists become tuples."""
    chosen = {}
    for field in fields(cls):
        value = values.get(field.name)
        if value is not None:
            chosen[field.name] = tuple(value) if isinstance(value, list) else value
    return chosen


# ---- what is refused


def _check_bounds(values: dict[str, Any], bounds: dict[str, Bounds], prefix: str) -> None:
    """ValueError, with the name after `prefix`, for a value of another type or out of its bounds."""
    nouns = {int: "a whole number", float: "a number", tuple: "a list of whole numbers"}
    for name, (kind, least, most) in bounds.items():
        value = values.get(name)
        if value is not None and not _within(value, kind, least, most):
            raise ValueError(f"{prefix}{name} is {value!r:.40}, it must be {nouns[kind]} from {least:g} to {most:g}")


def _within(value: Any, kind: type, least: float, most: float) -> bool:
    if kind is tuple:
        return isinstance(value, list | tuple) and all(_within(number, int, least, most) for number in value)
    kinds = int | float if kind is float else int
    if not isinstance(value, kinds) or isinstance(value, bool):  # Python counts a bool as an int
        return False
    return least <= value <= most  # NaN fails here


def _refuse_variants(text: dict[str, Any], ropes: Sequence[dict], vision: dict[str, Any], config: ModelConfig) -> None:
    """ValueError for a setting that would silently compute something else than the checkpoint means."""
    channels = vision.get("in_channels", vision.get("in_chans"))
    is_qwen3 = isinstance(config, Qwen3VLConfig)
    _refuse_unless("hidden_act", text.get("hidden_act"), "silu")
    _refuse_unless("head_dim", text.get("head_dim"), config.head_dim)
    _refuse_unless("attention_bias", text.get("attention_bias"), not is_qwen3)
    _refuse_unless("use_sliding_window", text.get("use_sliding_window"), False)
    layer_types = text.get("layer_types")
    for layer_type in layer_types if isinstance(layer_types, list) else [layer_types]:
        _refuse_unless("layer_types", layer_type, "full_attention")
    for rope in ropes:
        _refuse_unless("rope type", rope.get("type"), "default", "mrope")
        _refuse_unless("rope type", rope.get("rope_type"), "default", "mrope")
        _refuse_unless("mrope_interleaved", rope.get("mrope_interleaved"), is_qwen3)
    for part in (text, *ropes):
        _refuse_unless("partial_rotary_factor", part.get("partial_rotary_factor"), 1)
    _refuse_unless("vision_config.hidden_act", vision.get("hidden_act"), config.vision.hidden_act)
    _refuse_unless("vision_config.in_channels", channels, CHANNELS)
    _refuse_unless("vision_config.patch_size", vision.get("patch_size"), config.vision.processor.patch)
    _refuse_unless("vision_config.spatial_merge_size", vision.get("spatial_merge_size"), MERGE)
    _refuse_unless("vision_config.temporal_patch_size", vision.get("temporal_patch_size"), FRAMES)


def _refuse_unless(name: str, found: Any, *allowed: Any) -> None:
    """ValueError unless `found` is one of `allowed`, or None: then config.json does not say."""
    if found is not None and found not in allowed:
        raise ValueError(f"{name} is {found!r:.40}, this program runs {' or '.join(map(repr, allowed))} only")


def _refuse_contradictions(config: ModelConfig) -> None:
    """ValueError for sizes of config.json that do not fit each other."""
    for holds, rule in chain(_rules(config), _rules_of_qwen3(config)):
        if not holds:
            raise ValueError(rule)


def _rules(config: ModelConfig) -> Iterator[tuple[bool, str]]:
    """(whether it holds, a rule). A rule may rely on those before it."""
    vision = config.vision
    ids = (config.image_token_id, config.video_token_id, config.vision_start_token_id, config.vision_end_token_id)
    half_head = config.head_dim / 2
    sections = config.mrope_section
    if not isinstance(config, Qwen3VLConfig):  # whose heads have a size of their own, and whose tower has no windows
        side = vision.processor.side
        yield config.hidden_size % config.num_attention_heads == 0, "num_attention_heads must divide hidden_size"
        yield vision.window_size % side == 0, f"vision_config.window_size must be a multiple of {side}"
    yield (
        config.num_attention_heads % config.num_key_value_heads == 0,
        "num_key_value_heads must divide num_attention_heads",
    )
    yield (
        len(sections) == 3 and sum(sections) == half_head,
        f"mrope_section must be three numbers with the sum {half_head:g}, half a head",
    )
    yield (
        max(ids) < config.vocab_size,
        f"image, video and vision token ids {ids} must be below vocab_size {config.vocab_size}",
    )
    yield len(set(ids)) == len(ids), f"image, video and vision token ids {ids} must differ"
    yield vision.hidden_size % (4 * vision.num_heads) == 0, "vision_config: 4 * num_heads must divide hidden_size"
    yield vision.out_hidden_size == config.hidden_size, "vision_config.out_hidden_size must be hidden_size"


def _rules_of_qwen3(config: ModelConfig) -> Iterator[tuple[bool, str]]:
    """As `_rules`, for what only Qwen3-VL has."""
    if not isinstance(config, Qwen3VLConfig):
        return
    vision = config.vision
    time, row, column = config.mrope_section
    places = vision.num_position_embeddings
    levels = vision.deepstack_visual_indexes
    yield max(row, column) <= time, "mrope_section: they take turns, so none may be larger than the first"
    yield math.isqrt(places) ** 2 == places, "vision_config.num_position_embeddings must be a square"
    yield (
        list(levels) == sorted({level for level in levels if level < vision.depth}),
        f"vision_config.deepstack_visual_indexes must be some of the {vision.depth} blocks, in order",
    )
    yield (
        len(levels) <= config.num_hidden_layers,
        f"vision_config.deepstack_visual_indexes: more than num_hidden_layers, {config.num_hidden_layers}",
    )
