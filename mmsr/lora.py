"""LoRA: a few trained numbers beside frozen weights (arXiv 2106.09685), with the initialisation and names of PEFT.

A linear layer with weight W (out, in) gets an adapter of rank r: two small matrices A (r, in) and B (out, r).

    y = W x + b + (α / r) B (A x)        W and b are frozen, A and B are trained                                    (11)

A begins with uniform random numbers in ±1/√in, B with zeros: the first forward pass is that of the model without
adapters. In a 7B model r = 64 trains 161 million numbers instead of 8 billion. So gradients, moments, checkpoints and
what devices exchange are small. The KL term needs no second model: its reference is the model with its adapters off
(`as_reference`).

Three forms of (11) give the same numbers, up to rounding:

    plain     `LoRALinear.forward`: A x, then B times that with the bias, then W x is added. Training uses it.
    stacked   `Stack`: several layers with the same input, such as the projections to queries, keys and values, take
              their A in one product, and their B in one. Sampling uses it, where every kernel counts.
    merged    `merge`: W + (α / r) B A as one matrix, for programs that know nothing of adapters.

What is small is computed first. A number of bfloat16 stays as it is if less than half of the distance to its neighbour
is added, and the first steps change a layer's outputs by less than that: added to a rounded W x they would be lost
(docs/performance.md). Here W x is added to what the adapter gives, within its own product, which sums in fp32 and is
rounded once. In merged weights the first steps are lost too, so sampling does not use them: it draws from the model
that is trained. A and B are kept in fp32 and rounded to the type of the computation where they are used.

Shape letters: N packed tokens, r rank, n layers of a stack.
"""

from __future__ import annotations

import math
import zlib
from contextlib import contextmanager
from typing import Any, Iterable, Iterator, Sequence, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmsr.system.errors import UserError

AnyModule = TypeVar("AnyModule", bound=nn.Module)

ADAPTER_NAMES = ("lora_A", "lora_B")  # of the parameters that a layer gets
# Parts of the model by the names that --freeze and --lora-targets have for them: how their weights' names begin.
PARTS = {
    "vision": ("visual",),
    "merger": ("visual.merger", "visual.deepstack_merger_list"),
    "decoder": ("model.layers",),
    "embedding": ("model.embed_tokens",),
    "head": ("lm_head",),
    "norm": ("model.norm",),
}
# Layers with the same input, in the order in which the model asks for them; and whether sampling copies their weights
# to one matrix. Those of an MLP would be most of the model.
SAME_INPUT = {("q_proj", "k_proj", "v_proj"): True, ("gate_proj", "up_proj"): False}


class LoRALinear(nn.Linear):
    """A frozen linear layer with an adapter: equation (11). Made from an nn.Linear in place, by `add_adapter`."""

    lora_A: nn.Parameter  # (r, in)
    lora_B: nn.Parameter  # (out, r)
    scale: float  # α / r
    start: tuple[Tensor, Tensor] | None = None  # A and B of the KL reference, those at the start; None: it has none
    as_reference = False  # whether the forward pass is that of the reference
    # In sampling one of these computes it:
    stack: Stack | None = None  # this layer and others, for which `vision.project` asks the first of them
    alone: Stack | None = None  # this layer alone

    def forward(self, x: Tensor) -> Tensor:
        """(N, in) to (N, out)."""
        if self.alone is not None:
            return self.alone(x)[0]
        adapter = self.start if self.as_reference else (self.lora_A, self.lora_B)
        if adapter is None:
            return F.linear(x, self.weight, self.bias)
        a, b = adapter
        low = F.linear(x, a.to(x.dtype))  # (N, r)
        y = F.linear(low, (self.scale * b).to(x.dtype), self.bias)  # (N, out)
        return y.addmm_(x, self.weight.T)


def add_adapter(layer: nn.Module, a: Tensor, b: Tensor, scale: float) -> None:
    """Turn an nn.Linear into a `LoRALinear`, in place.

    Only its class changes, as FSDP does it too: its weight may be sharded by now, and FSDP knows this very object.
    """
    assert type(layer) is nn.Linear
    layer.requires_grad_(False)
    with_adapter: Any = layer
    with_adapter.__class__ = LoRALinear
    with_adapter.lora_A = nn.Parameter(a)
    with_adapter.lora_B = nn.Parameter(b)
    with_adapter.scale = scale


def initial(layer: nn.Linear, name: str, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """A and B of a fresh adapter, fp32 on the CPU. Equal seeds give equal numbers for a layer of this name.

    `layer` tells the sizes, and may be on the meta device.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
    bound = 1 / math.sqrt(layer.in_features)
    a = torch.empty(rank, layer.in_features, device="cpu").uniform_(-bound, bound, generator=generator)
    b = torch.zeros(layer.out_features, rank, device="cpu")
    return a, b


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers that may get an adapter, by name: all linear ones but the head, whose weight is used by itself."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    found.pop("lm_head", None)
    return found


def adapted(model: nn.Module) -> dict[str, LoRALinear]:
    """The layers that have an adapter, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return name.rpartition(".")[2] in ADAPTER_NAMES


# ---- what is trained


def targeted(layers: Iterable[str], targets: Sequence[str]) -> list[str]:
    """The layers among these that --lora-targets names; without targets those of the decoder.

    A target is a part ("decoder", "vision"), a layer in every block of the decoder ("q_proj") or of another part
    ("vision.qkv"), or the beginning of names ("model.layers.3"). Raises UserError for one that names no layer.
    """
    layers = list(layers)
    found: set[str] = set()
    for target in targets or ["decoder"]:
        chosen = {layer for layer in layers if _is_target(layer, target)}
        if not chosen:
            raise UserError(f"--lora-targets {target}: the model has no such linear layer; {_possible(layers)}")
        found |= chosen
    return [layer for layer in layers if layer in found]


def _possible(layers: Iterable[str]) -> str:
    """What --lora-targets may name."""
    names = {}
    for part in ("decoder", "vision"):
        last = {layer.rpartition(".")[2] for layer in layers if _begins(layer, part)}
        names[part] = sorted(name for name in last if not name.isdigit())
    of_tower = [f"vision.{name}" for name in names["vision"]]
    listed = ["decoder", *names["decoder"], "vision", "merger", *of_tower]
    return f"give, with blanks between them, {', '.join(listed)}, or beginnings of names such as model.layers.0"


def _is_target(layer: str, target: str) -> bool:
    if _begins(layer, target):
        return True
    part, _, last = target.rpartition(".")
    return _begins(layer, part or "decoder") and layer.endswith(f".{last}")


def frozen(weights: Iterable[str], parts: Sequence[str]) -> set[str]:
    """The weights among these that --freeze names. A part is one of PARTS, or the beginning of weights' names.

    Raises UserError for a part without weights, and where none would be left to train.
    """
    weights = list(weights)
    found: set[str] = set()
    for part in parts:
        chosen = {weight for weight in weights if _begins(weight, part)}
        if part == "head" and not chosen:
            raise UserError("--freeze head: the head of this model is its embedding; give embedding")
        if not chosen:
            possible = f"{', '.join(PARTS)}, or beginnings of names such as model.layers.0"
            raise UserError(
                f"--freeze {part}: the model has no such weights; give, with blanks between them, {possible}"
            )
        found |= chosen
    if len(found) == len(weights):
        raise UserError(f"--freeze {' '.join(parts)}: nothing is left to train; freeze less")
    return found


def layers_to_adapt(
    weights: Iterable[str], layers: Iterable[str], targets: Sequence[str], parts: Sequence[str]
) -> list[str]:
    """The layers that get an adapter: those that --lora-targets names, without those that --freeze names.

    `weights`: all of the model's. Raises UserError, also where no layer is left.
    """
    are_frozen = frozen(weights, parts)
    chosen = [layer for layer in targeted(layers, targets) if f"{layer}.weight" not in are_frozen]
    if not chosen:
        raise UserError(f"--freeze {' '.join(parts)} leaves none of --lora-targets to train; freeze less")
    return chosen


def _begins(name: str, part: str) -> bool:
    """Whether a dotted name is inside of a part: one of PARTS, or the beginning of names."""
    return any(f"{name}.".startswith(f"{beginning}.") for beginning in PARTS.get(part, (part,)))


def trains_tower(model: Any) -> bool:
    """Whether any weight or adapter of the vision tower is trained. If not, a picture's features never change."""
    return any(parameter.requires_grad for parameter in model.visual.parameters())


# ---- the KL reference


def keep_as_reference(model: nn.Module) -> None:
    """Take the adapters as they are now for the reference. Without this call the reference has none."""
    for layer in adapted(model).values():
        layer.start = (layer.lora_A.detach().clone(), layer.lora_B.detach().clone())


@contextmanager
def as_reference(model: AnyModule) -> Iterator[AnyModule]:
    """In the block, the model computes what it did before training: without adapters, or with those kept for it.

    A model without adapters is its own reference, as a frozen copy is.
    """
    layers = adapted(model).values()
    for layer in layers:
        layer.as_reference = True
    try:
        yield model
    finally:
        for layer in layers:
            layer.as_reference = False


# ---- sampling


class Stack:
    """n layers with the same input, whose adapters take two products instead of 2 n.

    The A of all layers are stacked to one matrix (Σ r, in). Their B stand on the diagonal of one (Σ out, Σ r) that is 0
    elsewhere, so each layer's output sees its own r numbers alone. The layers' outputs are the columns of one tensor.
    With `copy_weights` their W become one matrix too, and their products one, for the memory of a copy.
    """

    def __init__(self, layers: Sequence[LoRALinear], dtype: torch.dtype, copy_weights: bool = False):
        self.weights = [layer.weight.detach() for layer in layers]  # (out, in) each
        if copy_weights:
            self.weights = [torch.cat(self.weights)]  # (Σ out, in)
        self.widths = [layer.out_features for layer in layers]
        biases = [layer.bias.detach() for layer in layers if layer.bias is not None]  # of all, or of none
        self.bias = torch.cat(biases) if biases else None  # (Σ out,)
        self.a = torch.cat([layer.lora_A.detach() for layer in layers]).to(dtype)  # (Σ r, in)
        self.b = torch.block_diag(*[layer.scale * layer.lora_B for layer in layers]).to(dtype)  # (Σ out, Σ r)

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """Each layer's output (N, out) for x (N, in)."""
        low = F.linear(x, self.a)  # (N, Σ r)
        together = F.linear(low, self.b, self.bias)  # (N, Σ out)
        parts = together.split([len(weight) for weight in self.weights], 1)
        for part, weight in zip(parts, self.weights):
            part.addmm_(x, weight.T)
        return together.split(self.widths, 1)


@torch.no_grad()
def for_sampling(whole: AnyModule, trained: nn.Module, dtype: torch.dtype) -> AnyModule:
    """A model that samples with the adapters of `trained`, rounded to `dtype` as training rounds them.

    It shares the weights of `whole`, which may be `trained` itself, but for copies of those that project to queries,
    keys and values: 7 % of the decoder. Without adapters it is `whole`.
    """
    layers = adapted(trained)
    if not layers:
        return whole
    with torch.device("meta"):
        model = type(whole)(whole.config)
    weights = {name: weight.detach() for name, weight in whole.named_parameters() if not is_adapter(name)}
    model.load_state_dict(weights, assign=True)
    for name, layer in layers.items():
        add_adapter(model.get_submodule(name), layer.lora_A.detach(), layer.lora_B.detach(), layer.scale)
    sampled = adapted(model)
    for names, copy_weights in stacks(sampled):
        first = sampled[names[0]]
        stack = Stack([sampled[name] for name in names], dtype, copy_weights)
        if len(names) > 1:
            first.stack = stack
        else:
            first.alone = stack
    return model.requires_grad_(False)


def stacks(layers: Iterable[str]) -> list[tuple[list[str], bool]]:
    """How sampling groups layers with adapters, by their names: those with the same input together, others alone.

    Of each group also whether the weights are copied to one matrix.
    """
    alone = dict.fromkeys(layers)  # a set that keeps the order
    found = []
    for block in dict.fromkeys(layer.rpartition(".")[0] for layer in alone):
        for names, copy_weights in SAME_INPUT.items():
            together = [f"{block}.{name}" for name in names]
            if alone.keys() >= set(together):
                found.append((together, copy_weights))
    for together, _ in found:
        for layer in together:
            del alone[layer]
    return found + [([layer], False) for layer in alone]


# ---- merging


@torch.no_grad()
def merge(weights: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Whole weights by name with the adapters of `model` merged in: W + (α / r) B A, summed in fp32.

    `weights` are those of `model`, with its adapters or without. They are taken out one by one, so that no weight is
    there twice.
    """
    layers = adapted(model)
    merged = {}
    for whole_name in list(weights):
        weight = weights.pop(whole_name)  # (out, in)
        if is_adapter(whole_name):
            continue
        layer = layers.get(whole_name.removesuffix(".weight"))
        merged[whole_name] = weight if layer is None else _merged(weight, layer)
    return merged


def _merged(weight: Tensor, layer: LoRALinear) -> Tensor:
    """The weight (out, in) of a layer with its adapter, on the CPU."""
    a = layer.lora_A.to(weight.device)
    b = layer.lora_B.to(weight.device)
    total = torch.addmm(weight.float(), b, a, alpha=layer.scale)
    return total.to("cpu", weight.dtype)
