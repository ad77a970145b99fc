"""The shapes of a model's weights, and which of them a run trains, or which adapters: without reading a weight.

The plans of memory and disk count them. What --lora-targets and --freeze name is held against them before a download.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

from mmsr import lora
from mmsr.config import Config
from mmsr.model import ModelConfig
from mmsr.pretrained.adapter import check_layers
from mmsr.pretrained.hub import resolve_adapter


@dataclass(frozen=True)
class Sizes:
    """The shapes of a model's weights, by name."""

    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    layers: tuple[str, ...]  # that may have an adapter

    def count(self, parts: int = 1, inside: str = "", among: frozenset[str] | None = None) -> int:
        """Numbers of the weights whose name begins with `inside`, on the rank with most of `parts`.

        Weights are cut along the first axis. `among`: only these are counted.
        """
        total = 0
        for name, shape in self.shapes:
            if name.startswith(inside) and (among is None or name in among):
                total += math.ceil(shape[0] / parts) * math.prod(shape[1:])
        return total


@lru_cache
def sizes(model: ModelConfig) -> Sizes:
    with torch.device("meta"):
        skeleton = model.build()
    shapes = tuple((name, tuple(weight.shape)) for name, weight in skeleton.named_parameters())
    return Sizes(shapes, tuple(lora.linear_layers(skeleton)))


class Adapter(NamedTuple):
    """Of one layer: matrices (rank, columns) and (rows, rank)."""

    layer: str
    rank: int
    rows: int
    columns: int
    biases: int  # of the layer itself

    @property
    def numbers(self) -> int:
        return self.rank * (self.rows + self.columns)


@dataclass(frozen=True)
class Trained:
    """What a run trains: weights, or adapters beside weights that are frozen."""

    weights: frozenset[str]  # their names
    adapters: tuple[Adapter, ...]

    @property
    def tower(self) -> bool:
        """Whether anything of the vision tower is trained."""
        names = [*self.weights, *(adapter.layer for adapter in self.adapters)]
        return any(name.startswith("visual.") for name in names)

    def numbers(self, inside: str = "") -> int:
        """Of the adapters in layers whose name begins with `inside`."""
        return sum(adapter.numbers for adapter in self.adapters if adapter.layer.startswith(inside))

    def ranks(self, inside: str = "") -> int:
        """Σ r over the adapters in layers whose name begins with `inside`."""
        return sum(adapter.rank for adapter in self.adapters if adapter.layer.startswith(inside))

    def stacked(self) -> int:
        """Numbers of the stacks that sampling makes: `lora.Stack`, with the zeros beside the diagonal.

        The weights that project to queries, keys and values are copied too.
        """
        by_layer = {adapter.layer: adapter for adapter in self.adapters}
        total = 0
        for names, copy_weights in lora.stacks(by_layer):
            stack = [by_layer[name] for name in names]
            ranks = sum(adapter.rank for adapter in stack)
            rows = sum(adapter.rows for adapter in stack)
            total += ranks * (stack[0].columns + rows) + sum(adapter.biases for adapter in stack)
            if copy_weights:
                total += rows * stack[0].columns
        return total


def trained(model: ModelConfig, config: Config) -> Trained:
    """Raises UserError where --lora-targets or --freeze names nothing, or --adapter does not fit the model."""
    return _trained(model, config.lora, config.lora_targets, config.freeze, config.adapter)


@lru_cache
def adapter_ranks(model: ModelConfig, folder: str) -> dict[str, int]:
    """The rank of each layer's adapter in --adapter. Raises UserError for one that does not fit the model."""
    with torch.device("meta"):
        layers = lora.linear_layers(model.build())
    _, pairs = check_layers(resolve_adapter(folder), layers)
    return {name: pair.a.shape[0] for name, pair in pairs.items()}


@lru_cache
def _trained(model: ModelConfig, rank: int, targets: tuple[str, ...], freeze: tuple[str, ...], folder: str) -> Trained:
    size = sizes(model)
    shapes = dict(size.shapes)
    if folder:
        found = adapter_ranks(model, folder)
    elif rank:
        found = dict.fromkeys(lora.layers_to_adapt(shapes, size.layers, targets, freeze), rank)
    else:
        return Trained(frozenset(shapes) - lora.frozen(shapes, freeze), ())
    adapters = []
    for name, r in found.items():
        rows, columns = shapes[f"{name}.weight"]
        adapters.append(Adapter(name, r, rows, columns, rows if f"{name}.bias" in shapes else 0))
    return Trained(frozenset(), tuple(adapters))
