"""Pictures to vectors, so that pictures that look alike lie close: what the local image index ranks by.

An encoder takes n RGB pictures and gives (n, d) float32, rows of length 1. Three are here. `builtin` has no weights: it
finds the *same* photograph again after cropping, turning, shrinking, recolouring and re-compressing, and knows nothing
of what a picture shows. `hf:NAME` is a Hugging Face vision model and `tower:FOLDER` the policy's own vision tower; only
these import torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Callable

import numpy as np
import PIL.Image

from mmsr.system.errors import UserError, first_line


@dataclass(frozen=True)
class Encoder:
    name: str  # what `open_encoder` opens it by
    encode: Callable[[list[PIL.Image.Image]], np.ndarray]  # n RGB pictures to (n, d) float32, unit rows


def open_encoder(name: str) -> Encoder:
    """The encoder of a name: builtin, hf:NAME_OR_FOLDER or tower:FOLDER. Raises UserError for any other."""
    if name == "builtin":
        return Encoder(name, lambda pictures: np.stack([_describe(picture) for picture in pictures]))
    kind, _, where = name.partition(":")
    if kind in ("hf", "tower") and where:
        folder = Path(where).expanduser()
        where = str(folder.resolve()) if folder.is_dir() else where
        return Encoder(f"{kind}:{where}", {"hf": _hugging_face, "tower": _tower}[kind](where))
    raise UserError(f"--encoder {name}: unknown; give builtin, hf:NAME (a Hugging Face vision model) or tower:FOLDER")


# ---- without weights

SIDE = 64  # a picture is squeezed to SIDE x SIDE pixels first
COLOUR_CELLS, LIGHTS, HUES = 3, 6, 5  # cells along a side; bins of lightness; of each of the two colour axes
SHAPE_CELLS, DIRECTIONS = 6, 8
SHAPE_WEIGHT = 0.5  # more forgives other colours, less forgives other crops


def _describe(picture: PIL.Image.Image) -> np.ndarray:
    """(567,) unit: colours in 3 x 3 soft cells, directions of edges in 6 x 6.

    Colours alone find nearly every crop, but no picture whose colours were changed; edges the other way round.
    """
    small = picture.resize((SIDE, SIDE), PIL.Image.Resampling.BILINEAR, reducing_gap=2.0)
    red, green, blue = np.moveaxis(np.asarray(small, dtype=np.float32) / 255, -1, 0)
    light = (red + green + blue) / 3
    return _unit(np.concatenate([_colours(light, red, green, blue), SHAPE_WEIGHT * _edges(light)]))


def _colours(light: np.ndarray, red: np.ndarray, green: np.ndarray, blue: np.ndarray) -> np.ndarray:
    """Histograms of lightness, and of red-green by yellow-blue. Roots, lest a large plain area outweigh the rest."""
    axes = [(red - green) / 2, (red + green - 2 * blue) / 4]
    axes = [_soft_bins(np.sign(axis) * np.sqrt(abs(axis)) / 1.2 + 0.5, HUES) for axis in axes]  # finer near grey
    pairs = (axes[0][..., :, None] * axes[1][..., None, :]).reshape(SIDE, SIDE, HUES**2)
    cells = _pool(np.concatenate([_soft_bins(light, LIGHTS), pairs], -1), COLOUR_CELLS, 0.6)
    return _unit(np.sqrt(cells).ravel())


def _edges(light: np.ndarray) -> np.ndarray:
    """Histograms of the directions of edges, weighted by their strength; each cell's is brought to the same scale."""
    across, down = np.zeros_like(light), np.zeros_like(light)
    across[:, 1:-1] = light[:, 2:] - light[:, :-2]
    down[1:-1] = light[2:] - light[:-2]
    turn = np.arctan2(down, across) / np.pi % 1 * DIRECTIONS  # an edge from dark to light is one from light to dark
    low = np.minimum(turn.astype(int), DIRECTIONS - 1)
    share = (turn - low).astype(np.float32)[..., None]
    eye = np.eye(DIRECTIONS, dtype=np.float32)
    bins = eye[low] * (1 - share) + eye[(low + 1) % DIRECTIONS] * share
    cells = _pool(bins * np.hypot(across, down)[..., None], SHAPE_CELLS, 0.5)
    cells /= np.sqrt((cells**2).sum(-1, keepdims=True) + 1e-4)
    return _unit((cells - cells.mean((0, 1))).ravel())


def _soft_bins(values: np.ndarray, bins: int) -> np.ndarray:
    """Values in 0 .. 1 to (..., bins): each is shared by the two bins next to it."""
    place = np.clip(values, 0, 1)[..., None] * (bins - 1)
    return np.maximum(0, 1 - abs(place - np.arange(bins, dtype=np.float32)))


def _pool(values: np.ndarray, cells: int, width: float) -> np.ndarray:
    """(SIDE, SIDE, b) to (cells, cells, b): means under bells, so that a shifted picture changes them little."""
    bells = _bells(cells, width)
    rows = np.tensordot(bells, values, 1)  # (cells, SIDE, b)
    return np.matmul(bells, rows)


@lru_cache
def _bells(cells: int, width: float) -> np.ndarray:
    """(cells, SIDE) rows of sum 1; `width` is the standard deviation in cells."""
    centres, places = (np.arange(cells) + 0.5) / cells, (np.arange(SIDE) + 0.5) / SIDE
    bells = np.exp(-0.5 * ((places - centres[:, None]) * cells / width) ** 2)
    return (bells / bells.sum(1, keepdims=True)).astype(np.float32)


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / (np.linalg.norm(rows, axis=-1, keepdims=True) + 1e-9)


# ---- with weights


def _hugging_face(name: str) -> Callable[[list[PIL.Image.Image]], np.ndarray]:
    """A Hugging Face model's image embedding where it has one (CLIP, SigLIP), else its pooled output or mean token."""
    import torch
    from transformers import AutoImageProcessor, AutoModel

    try:
        processor = AutoImageProcessor.from_pretrained(name, backend="pil")
        # No pickles; float32, as a half-precision CPU is slow. What the checkpoint lacks would be drawn at random.
        model, report = AutoModel.from_pretrained(
            name, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:  # of the hub's client, the file system or transformers' many readers
        raise UserError(
            f"--encoder hf:{name} cannot be opened ({first_line(error)}): check the name, or give a folder"
        ) from error
    lacking = set(report["missing_keys"])
    if any("pooler" not in key for key in lacking):
        raise UserError(f"--encoder hf:{name}: {len(lacking)} weights are missing ({min(lacking)}): give another model")
    model = model.eval().to(_device())

    @torch.inference_mode()
    def encode(pictures: list[PIL.Image.Image]) -> np.ndarray:
        pixels = processor(images=pictures, return_tensors="pt")["pixel_values"].to(model.device)
        out = model.get_image_features(pixels) if hasattr(model, "get_image_features") else model(pixels)
        if isinstance(out, torch.Tensor):
            pooled = out
        else:
            pooled = None if lacking else getattr(out, "pooler_output", None)
            pooled = out.last_hidden_state.mean(1) if pooled is None else pooled
        return _unit(pooled.flatten(1).cpu().numpy())

    return encode


def _tower(folder: str) -> Callable[[list[PIL.Image.Image]], np.ndarray]:
    """The mean of the tokens that the policy's vision tower makes of a picture."""
    import torch

    from mmsr import vision
    from mmsr.pretrained.config_json import read_config
    from mmsr.pretrained.load import stored_weights

    with torch.device("meta"):
        tower = torch.nn.ModuleDict({"visual": vision.VisionTower(read_config(folder).vision)})
    device = _device()
    weights = stored_weights(folder, tower)  # it asks for names and shapes alone
    tower.load_state_dict({name: tensor.to(device, torch.float32, copy=True) for name, tensor in weights}, assign=True)

    @torch.inference_mode()
    def encode(pictures: list[PIL.Image.Image]) -> np.ndarray:
        images = [vision.prepare(picture, "", vision.MIN_PIXELS, 448 * 448) for picture in pictures]
        tokens = tower["visual"](images).split([image.tokens for image in images])
        return _unit(torch.stack([rows.mean(0) for rows in tokens]).cpu().numpy())

    return encode


def _device():
    """The current CUDA device by its number, as the threads that search have another current one; or the CPU."""
    import torch

    cuda = torch.cuda.is_available()
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
