"""The model of a Hugging Face folder: config.json is read, weight files are checked by their headers, then loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Iterator

import torch
from torch import Tensor, nn

from mmsr.model import VLModel
from mmsr.pretrained.config_json import read_config
from mmsr.pretrained.weights import fitting, headers, own_head, refuse_others, tensors


def load(folder: Path | str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> VLModel:
    """The model of a Hugging Face folder, its weights cast to `dtype` on `device`.

    Tensors are read and cast one by one and become the parameters themselves, so memory never holds a second copy.
    Raises UserError for a folder that does not fit.
    """
    model = skeleton(folder)
    weights = {}
    for name, tensor in stored_weights(folder, model):
        # A copy even if nothing changes: the tensor read is a view of the file, which may be overwritten.
        weights[name] = tensor.to(device, dtype, copy=True)
    model.load_state_dict(weights, assign=True)
    return model


def skeleton(folder: Path | str) -> VLModel:
    """The model of a Hugging Face folder on the meta device: it has shapes and no weights. Only headers are read.

    If config.json ties the head to the embedding and a different head is stored, the model has a head of its own, as
    in transformers. Raises UserError for a folder that `load` would refuse, except for NaN.
    """
    folder = Path(folder)
    config = read_config(folder)
    found = headers(folder)
    if config.tie_word_embeddings and own_head(found):
        config = replace(config, tie_word_embeddings=False)
    with torch.device("meta"):
        model = config.build()
    shapes = _shapes(model)
    fitting(folder, found, shapes)
    refuse_others(folder, found, shapes)
    return model


def stored_weights(folder: Path | str, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of each parameter of `model`, one at a time. Other weights of the folder are skipped.

    Raises UserError for a weight that is missing or misshapen, or holds NaN or infinite numbers.
    """
    folder = Path(folder)
    yield from tensors(fitting(folder, headers(folder), _shapes(model)))


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
