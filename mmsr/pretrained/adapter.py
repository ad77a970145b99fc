"""The folder of a LoRA adapter in PEFT's form: read, checked against its base, written.

    adapter_config.json         rank, α, the names of the layers, the name of the base model
    adapter_model.safetensors   A and B of each layer; our own has the digest of the base's weights in its metadata

PEFT knows dozens of kinds of adapters, and most of them have tensors called lora_A and lora_B too. What is not equation
(11) of `mmsr/lora.py` would be read without an error and compute something else, so it is refused by name.

Names. transformers calls layers `model.language_model.layers.0…` and `model.visual.blocks.0…`, before version 4.52
`model.layers.0…` and `visual.blocks.0…`. Both are read, the first is written. The vision tower's MLPs have layers of
the same last names as the decoder's, so a layer is named from `layers` or `visual` on, which fits either.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from mmsr.lora import LoRALinear
from mmsr.pretrained.hub import repository
from mmsr.pretrained.load import skeleton
from mmsr.pretrained.weights import (
    FLOATS,
    Header,
    fitting,
    headers,
    headers_of,
    listed,
    nested_name,
    opened,
    our_name,
    read_object,
)
from mmsr.system.errors import UserError
from mmsr.system.files import make_out, write_whole

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
DIGEST = "base_digest"  # in the metadata of WEIGHTS
# A stored tensor's name. PEFT leaves the adapter's own name ("default") out when it saves; other programs may not.
STORED = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.\w+)?\.weight")
WITHOUT = ("lm_head", "embed_tokens", "patch_embed.proj")  # parts of the model that get no adapter here
MERGE_IT = "merge it into its base (PEFT's merge_and_unload and save_pretrained) and give that folder as the model"
# Fields of adapter_config.json that make of it something else than equation (11).
OTHER_KINDS = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "alora_invocation_tokens": "aLoRA, which begins at certain tokens",
    "arrow_config": "Arrow, a choice among adapters",
    "kasa_config": "KaSA, which changes the base",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
    "lora_bias": "an adapter with biases",
    "modules_to_save": "an adapter with whole layers beside it",
    "trainable_token_indices": "an adapter with tokens of the embedding beside it",
    "target_parameters": "an adapter of other parameters than linear layers'",
    "layer_replication": "an adapter of a model whose layers are repeated",
}
BEGINNINGS = (True, False, "gaussian", "orthogonal", "eva")  # of A and B; others take something off the base's weights
# Fields that say nothing about what is computed, or nothing that the tensors do not say themselves.
UNUSED = {
    *("auto_mapping", "revision", "task_type", "inference_mode", "peft_version", "runtime_config"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "ensure_weight_tying"),
    *("megatron_config", "megatron_core", "fan_in_fan_out", "qalora_group_size"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),  # see `init_lora_weights`
}
USED = {
    *("peft_type", "base_model_name_or_path", "init_lora_weights", "bias", "lora_dropout"),
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"),
}


@dataclass(frozen=True)
class Settings:
    """What adapter_config.json says, of what matters here."""

    file: Path
    base: str  # the model that it belongs to, as the file calls it; "" where it does not say
    rank: int
    alpha: float
    rank_pattern: Mapping[str, float]  # by a regular expression of layers' names: what they have in place of `rank`
    alpha_pattern: Mapping[str, float]
    rslora: bool  # whether α is divided by the root of the rank (arXiv 2312.03732)
    dropout: float
    unknown: tuple[str, ...]  # fields that are not known here

    def of_layer(self, name: str) -> tuple[int, float]:
        """The rank and the scale α / r of the layer of this name."""
        rank = int(_matching(self.file, self.rank_pattern, name, self.rank))
        alpha = _matching(self.file, self.alpha_pattern, name, self.alpha)
        return rank, alpha / (math.sqrt(rank) if self.rslora else rank)


@dataclass(frozen=True)
class Adapter:
    """What an adapter's folder holds."""

    folder: Path
    layers: dict[str, tuple[Tensor, Tensor, float]]  # by our name of a layer: A, B (fp32, on the CPU), α / r
    digest: str  # `base_digest` of the base; "" where the folder has none, as PEFT's own
    settings: Settings

    def notes(self, training: bool) -> list[str]:
        """What a user should know of it, a line each."""
        lines = []
        if self.settings.unknown:
            lines.append(f"{self.settings.file} has {listed(self.settings.unknown)}, not known here: not used.")
        if training and self.settings.dropout:
            lines.append(f"{self.settings.file} has lora_dropout {self.settings.dropout}: nothing is dropped here.")
        return lines


@dataclass(frozen=True)
class Pair:
    """The two tensors of a layer, as their file's header describes them."""

    name: str  # the layer's, in the model that PEFT has saved the adapter of
    a: Header
    b: Header


# ---- reading


def read_adapter(folder: Path, layers: Mapping[str, nn.Linear]) -> Adapter:
    """The adapter in a folder, for a model whose linear layers are `layers`: they may be on the meta device.

    Raises UserError for a folder without an adapter, one of another kind than LoRA, a damaged one, and one of another
    model.
    """
    settings, pairs = check_layers(folder, layers)
    found = {}
    with opened(folder / WEIGHTS) as stored:
        digest = (stored.metadata() or {}).get(DIGEST, "")
        for name, pair in pairs.items():
            a, b = [_finite(stored.get_tensor(header.name), header) for header in (pair.a, pair.b)]
            _, scale = settings.of_layer(pair.name)
            found[name] = (a, b, scale)
    return Adapter(folder, found, digest, settings)


def check_layers(folder: Path, layers: Mapping[str, nn.Linear]) -> tuple[Settings, dict[str, Pair]]:
    """What adapter_config.json says, and each layer's tensors by their headers. No number is read.

    Raises UserError for a folder that `read_adapter` would refuse, except for NaN.
    """
    settings = read_settings(folder)
    pairs = _pairs(folder / WEIGHTS)
    lacking = [pair.name for name, pair in pairs.items() if name not in layers]
    if lacking:
        _refuse_layers(settings, lacking, len(pairs))
    for name, pair in pairs.items():
        _check_sizes(pair, layers[name], settings)
    return settings, pairs


def read_settings(folder: Path) -> Settings:
    """What an adapter's folder says of it, without its tensors. Raises UserError for what no model can use."""
    if not (folder / CONFIG).is_file():
        _explain_absence(folder)
    file = folder / CONFIG
    values = read_object(file)
    _refuse_other_kinds(file, values)
    if not (folder / WEIGHTS).is_file():
        if any(folder.glob("adapter_model*.bin")):
            advice = "open it with PEFT and save it again, which writes safetensors"
            raise UserError(f"{folder} holds a pickled adapter, which is not opened here: {advice}")
        raise UserError(f"{folder} has {CONFIG} and no {WEIGHTS}: write or fetch it again")
    base = values.get("base_model_name_or_path")
    unknown = [name for name, value in values.items() if value and name not in UNUSED | USED | OTHER_KINDS.keys()]
    variants = [name for name in unknown if name.startswith("use_")]
    if variants:
        raise UserError(f"{file}: {listed(variants)} is not known here, and may compute something else: {MERGE_IT}")
    return Settings(
        file,
        base=listed([base]) if isinstance(base, str) else "",
        rank=int(_number(file, values, "r", least=1)),
        alpha=_number(file, values, "lora_alpha"),
        rank_pattern=_numbers(file, values, "rank_pattern", least=1),
        alpha_pattern=_numbers(file, values, "alpha_pattern"),
        rslora=values.get("use_rslora") is True,
        dropout=_number(file, {"lora_dropout": 0, **values}, "lora_dropout"),
        unknown=tuple(unknown),
    )


def _explain_absence(folder: Path) -> None:
    """UserError for a folder without adapter_config.json: what should be given instead."""
    if inside := sorted(folder.glob(f"*/{CONFIG}")):
        raise UserError(f"--adapter {folder} is no adapter's folder, but {inside[0].parent} is: give that")
    if any(folder.glob("*.safetensors")) and (folder / "config.json").is_file():
        raise UserError(f"--adapter {folder} holds a whole model, no adapter: give it as --model, without --adapter")
    if (folder / "metrics.jsonl").is_file():
        advice = "a run with --lora writes one when it ends; go on with --resume, or give another folder"
        raise UserError(f"--adapter {folder} is a run's folder without adapter/: {advice}")
    raise UserError(f"--adapter {folder} has no {CONFIG}: give a folder that PEFT or a run with --lora wrote")


def _refuse_other_kinds(file: Path, values: Mapping[str, Any]) -> None:
    """UserError for what is no LoRA, or another one than equation (11)."""
    kind = values.get("peft_type")
    if kind != "LORA":
        said = listed([str(kind)])
        raise UserError(f"{file}: peft_type is {said}, and only LORA is read here: {MERGE_IT}")
    for name, what in OTHER_KINDS.items():
        if values.get(name):
            raise UserError(f"{file}: {name} makes it {what}, and only plain LoRA is read here: {MERGE_IT}")
    if values.get("bias", "none") != "none":
        raise UserError(f"{file}: bias is {listed([str(values['bias'])])}, so it changes the base's biases: {MERGE_IT}")
    beginning = values.get("init_lora_weights", True)
    if beginning not in BEGINNINGS:
        said = f"init_lora_weights is {listed([str(beginning)])}, which changes the base's weights"
        advice = "save it with PEFT as plain LoRA (save_pretrained's path_initial_model_for_weight_conversion)"
        raise UserError(f"{file}: {said}: {advice}, or {MERGE_IT}")


def _number(file: Path, values: Mapping[str, Any], name: str, least: float = -math.inf) -> float:
    value = values.get(name)
    if type(value) not in (int, float) or not math.isfinite(value) or value < least:
        raise UserError(
            f"{file}: {name} is {listed([str(value)])}, not a number that it can be: write or fetch it again"
        )
    return value


def _numbers(file: Path, values: Mapping[str, Any], name: str, least: float = -math.inf) -> dict[str, float]:
    """The numbers of rank_pattern or alpha_pattern."""
    found = values.get(name) or {}
    if not isinstance(found, dict):
        raise UserError(f"{file}: {name} is no object: write or fetch it again")
    return {pattern: _number(file, found, pattern, least) for pattern in found}


def _matching(file: Path, patterns: Mapping[str, float], name: str, usual: float) -> float:
    """The number of the first pattern that a layer's name, or its end from a dot on, matches: as PEFT has it."""
    for pattern, number in patterns.items():
        try:
            if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", name):
                return number
        except re.error as error:
            said = listed([pattern])
            raise UserError(f"{file}: {said} is no regular expression ({error}): write or fetch it again") from None
    return usual


def _pairs(file: Path) -> dict[str, Pair]:
    """The tensors of a file by our names of the layers. UserError for others than A and B, and for one without the
    other."""
    found: dict[str, dict[str, Header]] = {}  # by our name and then by letter
    names = {}
    for header in headers_of(file):
        match = STORED.fullmatch(header.name)
        if not match or header.dtype not in FLOATS:
            raise UserError(f"{file}: {listed([header.name])} ({header.dtype}) is not of plain LoRA: {MERGE_IT}")
        name = our_name(match[1])
        names[name] = match[1]
        if match[2] in found.setdefault(name, {}):
            raise UserError(f"{file}: {listed([header.name])} is there twice, by two names: write or fetch it again")
        found[name][match[2]] = header
    if not found:
        raise UserError(f"{file} holds no tensors: write or fetch it again")
    for name, pair in found.items():
        if len(pair) < 2:
            (there,) = pair
            missing = "B" if there == "A" else "A"
            raise UserError(f"{file}: {listed([name])} has lora_{there} and no lora_{missing}: write or fetch it again")
    return {name: Pair(names[name], pair["A"], pair["B"]) for name, pair in found.items()}


def _refuse_layers(settings: Settings, lacking: list[str], total: int) -> None:
    """UserError for layers that have no adapter here, or that the model does not have."""
    for name in lacking:
        if name.endswith(WITHOUT):
            raise UserError(f"{settings.file.parent}: {listed([name])} has no adapter here: {MERGE_IT}")
    some = f"{len(lacking)} of its {total} layers are not in the model ({listed(lacking)})"
    raise UserError(f"--adapter {settings.file.parent}: {some}: {_other_model(settings)}")


def _other_model(settings: Settings) -> str:
    return f"it belongs to another model: give its base{f', {settings.base}' if settings.base else ''}"


def _check_sizes(pair: Pair, layer: nn.Linear, settings: Settings) -> None:
    """UserError where the tensors do not fit the layer, or have another rank than they should."""
    rank, _ = settings.of_layer(pair.name)
    file = pair.a.file
    if len(pair.a.shape) != 2 or pair.a.shape[0] != rank:
        said = f"{settings.file} gives it rank {rank}: write or fetch both again"
        raise UserError(f"{file}: {listed([pair.a.name])} has shape {pair.a.shape}, and {said}")
    for header, wanted in ((pair.a, (rank, layer.in_features)), (pair.b, (layer.out_features, rank))):
        if header.shape != wanted:
            what = f"{listed([header.name])} has shape {header.shape}, the model needs {wanted}"
            raise UserError(f"{file}: {what}: {_other_model(settings)}")


def _finite(tensor: Tensor, header: Header) -> Tensor:
    """A copy in fp32: what is read is a view of the file. UserError for NaN and infinite numbers."""
    tensor = tensor.to(torch.float32, copy=True)
    if not tensor.isfinite().all():
        raise UserError(f"{header.file}: {header.name} holds NaN or infinite numbers: take an earlier one")
    return tensor


# ---- writing


def write_adapter(folder: Path, layers: Mapping[str, LoRALinear], base: str, digest: str) -> None:
    """Write the adapters of `layers`, which are by our names, so that PEFT and `read_adapter` open them.

    `base`: the name of the base model, `base_name`; `digest`: `base_digest` of it. A save that is killed leaves what
    was there, or a folder that is refused. Raises UserError where the folder cannot be written.
    """
    tensors = {}
    for name, layer in layers.items():
        for letter, tensor in (("A", layer.lora_A), ("B", layer.lora_B)):
            tensors[f"base_model.model.{nested_name(name)}.lora_{letter}.weight"] = _to_write(tensor)
    config = json.dumps(_config(layers, base), indent=2).encode() + b"\n"
    make_out(folder)
    file = folder / CONFIG
    if file.is_file() and file.read_bytes() != config:
        file.unlink()  # it would describe the new tensors if this ended before the last line
    write_whole(folder / WEIGHTS, [_in_order(safetensors_bytes(tensors, {"format": "pt", DIGEST: digest}))])
    write_whole(file, [config])


def _in_order(data: bytes) -> bytes:
    """A safetensors file whose header has its keys in order: equal adapters are equal files.

    A file is the header's length in 8 bytes, the header in JSON with blanks behind it, and the numbers.
    """
    length = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + length]), sort_keys=True, separators=(",", ":"))
    return data[:8] + header.encode().ljust(length) + data[8 + length :]


def _to_write(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32).contiguous()


def _end(layer: str) -> str:
    """The end of a layer's name by which PEFT finds it, and it alone, in transformers before and after 4.52."""
    return layer.removeprefix("model.")


def _config(layers: Mapping[str, LoRALinear], base: str) -> dict[str, Any]:
    """adapter_config.json. What most layers have is said once; patterns name the others."""
    ranks = {_end(name): len(layer.lora_A) for name, layer in layers.items()}
    alphas = {_end(name): _alpha(layer) for name, layer in layers.items()}
    rank = _most_frequent(ranks.values())
    alpha = _most_frequent(alphas.values())
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "inference_mode": True,
    }


def _alpha(layer: LoRALinear) -> float:
    """α, whole where it was: 24 times 32 / 24 need not be 32."""
    exact = layer.scale * len(layer.lora_A)
    return round(exact) if math.isclose(exact, round(exact), rel_tol=1e-12) else exact


def _most_frequent(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]


# ---- the base


def base_name(model: str, folder: Path) -> str:
    """What an adapter's folder calls the model of `--model`, which is in `folder`: a hub id, or an absolute path."""
    return (repository(model) if model else "") or str(folder.absolute())


def check_base(adapter: Adapter, folder: Path, name: str, say: Callable[[str], Any], option: str = "--model") -> None:
    """Raises UserError where the model in `folder`, called `name`, has other weights than the adapter's base.

    Where the adapter does not know its base's weights, as PEFT's own do not, `say` gets a line about it. `option`: by
    which a base is given.
    """
    base = adapter.settings.base
    if not adapter.digest:
        named = f"it names {base} as its base" if base else "it names no base"
        say(f"--adapter {adapter.folder}: {named}; whether {name} has the same weights cannot be checked.")
    elif adapter.digest != base_digest(folder):
        if base == name:
            advice = "but has other weights by now: restore them"
        else:
            advice = f"and {name} has other weights: give {base} as {option}"
        raise UserError(f"--adapter {adapter.folder}: its base is {base}, {advice}")


def base_digest(folder: Path) -> str:
    """SHA-256 of a sample of the weights in a model's folder: tells one base from another.

    Of each weight the first, the middle and the last row count, with its name and shape; norms and biases count whole.
    Training changes every row of a layer's weight. Of an embedding it changes only rows of tokens that occurred, so a
    model whose embedding alone was trained may have the digest of the one that it began as.
    How the weights are shared out over files does not count, nor whether bf16 numbers are stored as fp32. Raises
    UserError.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in skeleton(folder).named_parameters()}
    by_file: dict[Path, list[tuple[str, Header]]] = {}
    for name, header in fitting(folder, headers(folder), shapes).items():
        by_file.setdefault(header.file, []).append((name, header))
    samples = {}
    for file, weights in by_file.items():
        with opened(file) as stored:
            for name, header in weights:
                samples[name] = _sample(stored.get_slice(header.name), header.shape)
    digest = hashlib.sha256()
    for name in sorted(samples):
        digest.update(f"{name} {shapes[name]}\n".encode() + samples[name])
    return digest.hexdigest()


def _sample(part: Any, shape: tuple[int, ...]) -> bytes:
    """SHA-256 of some rows of a stored weight, as fp32. `part`: safetensors' slice, which reads what is indexed."""
    if len(shape) < 2:
        rows = [part[:]]
    else:
        rows = [part[row : row + 1] for row in sorted({0, shape[0] // 2, shape[0] - 1})]
    digest = hashlib.sha256()
    for row in rows:
        digest.update(row.float().contiguous().numpy().tobytes())
    return digest.digest()
