"""Encoders of pictures, for the local image index: pictures that look alike get similar vectors.

An encoder takes n RGB pictures and returns (n, d) float32 rows of length 1. There are three. `builtin` has no weights:
it finds the same photograph after cropping, rotation, scaling, recolouring and compression, but does not know what is
in it. `hf:NAME` is a Hugging Face vision model, `tower:FOLDER` the policy's vision tower, `tower:FOLDER --adapter DIR`
the tower with a LoRA adapter; only these import torch.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Callable

import numpy as np
import PIL.Image

from mmsr.system.errors import UserError, first_line
from mmsr.system.progress import on_terminal, say


@dataclass(frozen=True)
class Encoder:
    name: str  # as `open_encoder` takes it
    encode: Callable[[list[PIL.Image.Image]], np.ndarray]  # n RGB pictures to (n, d) float32, unit rows


def open_encoder(name: str) -> Encoder:
    """The encoder of a name: builtin, hf:NAME_OR_FOLDER, tower:FOLDER or "tower:FOLDER --adapter FOLDER".

    Raises UserError for any other.
    """
    name, option, adapter = name.partition(" --adapter ")
    kind, _, where = name.partition(":")
    where, adapter = _absolute(where), _absolute(adapter)
    if option and kind != "tower":
        raise UserError(f"--adapter {adapter} with --encoder {name}: only tower:FOLDER can have one; leave it out")
    if name == "builtin":
        return Encoder(name, lambda pictures: np.stack([_describe(picture) for picture in pictures]))
    if kind == "hf" and where:
        return Encoder(f"hf:{where}", _hugging_face(where))
    if kind == "tower" and where:
        return Encoder(f"tower:{where}{option}{adapter}", _tower(where, adapter))
    raise UserError(f"--encoder {name}: unknown; give builtin, hf:NAME (a Hugging Face vision model) or tower:FOLDER")


def _absolute(where: str) -> str:
    """The path of a folder, wherever the next process works; a name as it is."""
    folder = Path(where).expanduser()
    return str(folder.resolve()) if where and folder.is_dir() else where


# ---- without weights

SIDE = 64  # a picture is scaled to SIDE × SIDE pixels first
COLOUR_CELLS, LIGHTS, HUES = 3, 6, 5  # cells along a side; bins of lightness; bins of each of the two colour axes
SHAPE_CELLS, DIRECTIONS = 6, 8
SHAPE_WEIGHT = 0.5  # a larger one tolerates other colours better, a smaller one other crops


def _describe(picture: PIL.Image.Image) -> np.ndarray:
    """(567,) of length 1: histograms of colours in 3 × 3 cells, and of edge directions in 6 × 6 cells. Colours alone
    find nearly every crop, but not a picture whose colours were changed. For edges it is the reverse."""
    small = picture.resize((SIDE, SIDE), PIL.Image.Resampling.BILINEAR, reducing_gap=2.0)
    red, green, blue = np.moveaxis(np.asarray(small, dtype=np.float32) / 255, -1, 0)  # (SIDE, SIDE) each
    light = (red + green + blue) / 3
    return _unit(np.concatenate([_colours(light, red, green, blue), SHAPE_WEIGHT * _edges(light)]))


def _colours(light: np.ndarray, red: np.ndarray, green: np.ndarray, blue: np.ndarray) -> np.ndarray:
    """Histograms of lightness, and of red-green × yellow-blue; their roots, so that large areas do not dominate."""
    axes = [(red - green) / 2, (red + green - 2 * blue) / 4]
    axes = [_soft_bins(np.sign(axis) * np.sqrt(abs(axis)) / 1.2 + 0.5, HUES) for axis in axes]  # finer near grey
    pairs = (axes[0][..., :, None] * axes[1][..., None, :]).reshape(SIDE, SIDE, HUES**2)
    cells = _pool(np.concatenate([_soft_bins(light, LIGHTS), pairs], -1), COLOUR_CELLS, 0.6)
    return _unit(np.sqrt(cells).ravel())


def _edges(light: np.ndarray) -> np.ndarray:
    """Histograms of edge directions, weighted by the edges' strength; each cell is normalised."""
    dx = np.zeros_like(light)
    dy = np.zeros_like(light)
    dx[:, 1:-1] = light[:, 2:] - light[:, :-2]
    dy[1:-1] = light[2:] - light[:-2]
    angle = np.arctan2(dy, dx) / np.pi % 1 * DIRECTIONS  # modulo half a turn: the sign of the contrast does not count
    low = np.minimum(angle.astype(int), DIRECTIONS - 1)
    share = (angle - low).astype(np.float32)[..., None]
    one_hot = np.eye(DIRECTIONS, dtype=np.float32)
    bins = one_hot[low] * (1 - share) + one_hot[(low + 1) % DIRECTIONS] * share  # (SIDE, SIDE, DIRECTIONS)
    cells = _pool(bins * np.hypot(dx, dy)[..., None], SHAPE_CELLS, 0.5)
    cells /= np.sqrt((cells**2).sum(-1, keepdims=True) + 1e-4)
    return _unit((cells - cells.mean((0, 1))).ravel())


def _soft_bins(values: np.ndarray, bins: int) -> np.ndarray:
    """Values in 0 .. 1 to (..., bins): each value is divided between the two nearest bins."""
    position = np.clip(values, 0, 1)[..., None] * (bins - 1)
    return np.maximum(0, 1 - abs(position - np.arange(bins, dtype=np.float32)))


def _pool(values: np.ndarray, cells: int, width: float) -> np.ndarray:
    """(SIDE, SIDE, b) to (cells, cells, b): means with Gaussian weights, so that a small shift changes little."""
    weights = _gaussians(cells, width)
    rows = np.tensordot(weights, values, 1)  # (cells, SIDE, b)
    return np.matmul(weights, rows)


@lru_cache
def _gaussians(cells: int, width: float) -> np.ndarray:
    """(cells, SIDE) rows of sum 1; `width` is the standard deviation in cells."""
    centres = (np.arange(cells) + 0.5) / cells
    positions = (np.arange(SIDE) + 0.5) / SIDE
    weights = np.exp(-0.5 * ((positions - centres[:, None]) * cells / width) ** 2)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / (np.linalg.norm(rows, axis=-1, keepdims=True) + 1e-9)


# ---- with weights


def _hugging_face(name: str) -> Callable[[list[PIL.Image.Image]], np.ndarray]:
    """A Hugging Face model's image embedding where it has one (CLIP, SigLIP), else its pooled output or mean token."""
    import torch
    from transformers import AutoImageProcessor, AutoModel
    from transformers.utils import logging

    from mmsr.pretrained.hub import out_of_reach

    if not on_terminal():
        logging.disable_progress_bar()  # of the download and of the weights: carriage returns in a log
    unreachable = "" if Path(name).is_dir() else out_of_reach()
    here = {"local_files_only": bool(unreachable)}  # otherwise the hub's client tries again for a minute and a half
    try:
        processor = AutoImageProcessor.from_pretrained(name, backend="pil", **here)
        # No pickles. float32, because half precision is slow on CPUs. Missing weights would be random: refused below.
        options = {"use_safetensors": True, "dtype": torch.float32, "output_loading_info": True}
        model, report = AutoModel.from_pretrained(name, **options, **here)
    except Exception as error:  # the hub's client, the file system and transformers raise many kinds
        what = f"--encoder hf:{name} cannot be opened ({unreachable or first_line(error)})"
        raise UserError(f"{what}: check the name, or give a folder") from error
    missing = set(report["missing_keys"])
    if any("pooler" not in key for key in missing):
        raise UserError(f"--encoder hf:{name}: {len(missing)} weights are missing ({min(missing)}): give another model")
    model = model.eval().to(_device())

    @torch.inference_mode()
    def encode(pictures: list[PIL.Image.Image]) -> np.ndarray:
        pixels = processor(images=pictures, return_tensors="pt")["pixel_values"].to(model.device)
        output = model.get_image_features(pixels) if hasattr(model, "get_image_features") else model(pixels)
        if isinstance(output, torch.Tensor):
            pooled = output
        elif missing or getattr(output, "pooler_output", None) is None:  # a pooler without weights is random
            pooled = output.last_hidden_state.mean(1)
        else:
            pooled = output.pooler_output
        return _unit(pooled.flatten(1).cpu().numpy())

    return encode


def _tower(folder: str, adapter: str) -> Callable[[list[PIL.Image.Image]], np.ndarray]:
    """The mean of a picture's tokens from the policy's vision tower, with an adapter unless it is ""."""
    import torch

    from mmsr import vision
    from mmsr.pretrained.config_json import read_config
    from mmsr.pretrained.load import stored_weights

    config = read_config(folder)
    size, processor = config.vision.out_hidden_size, config.vision.processor
    with torch.device("meta"):
        tower = torch.nn.ModuleDict({"visual": config.build().visual})
    device = _device()
    weights = stored_weights(folder, tower)  # uses the names and shapes in `tower`
    tower.load_state_dict({name: tensor.to(device, torch.float32, copy=True) for name, tensor in weights}, assign=True)
    if adapter:
        _add_adapter(tower, Path(folder), adapter)

    @torch.inference_mode()
    def encode(pictures: list[PIL.Image.Image]) -> np.ndarray:
        images = [vision.prepare(picture, "", vision.MIN_PIXELS, 448 * 448, processor) for picture in pictures]
        features = tower["visual"](images)[:, :size]  # without those of DeepStack
        tokens = features.split([image.tokens for image in images])
        return _unit(torch.stack([rows.mean(0) for rows in tokens]).cpu().numpy())

    return encode


def _add_adapter(tower, folder: Path, name: str) -> None:
    """Give the tower of the model in `folder` its part of an adapter. UserError where the adapter has no such part."""
    from mmsr import lora
    from mmsr.pretrained.adapter import check_base, read_adapter
    from mmsr.pretrained.hub import resolve_adapter
    from mmsr.pretrained.load import skeleton

    adapter = read_adapter(resolve_adapter(name), lora.linear_layers(skeleton(folder)))
    check_base(adapter, folder, str(folder), partial(say, file=sys.stderr), option="--encoder tower:FOLDER")
    layers = {name: numbers for name, numbers in adapter.layers.items() if name.startswith("visual.")}
    if not layers:
        advice = "pictures are encoded as without it; leave it out"
        raise UserError(f"--adapter {name} has no layers of the vision tower, of {len(adapter.layers)}: {advice}")
    device = _device()
    for layer, (a, b, scale) in layers.items():
        lora.add_adapter(tower.get_submodule(layer), a.to(device), b.to(device), scale)


def _device():
    """The current CUDA device with its number, because other threads have their own current device; else the CPU."""
    import torch

    cuda = torch.cuda.is_available()
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
