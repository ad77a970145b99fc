"""A LoRA adapter's folder in PEFT's form: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mmsr.lora import LoRALinear
from mmsr.system.parallel import Ranks


@dataclass(frozen=True)
class Adapter:
    """What an adapter's folder holds."""

    layers: dict[str, tuple[Tensor, Tensor, float]]  # by our name of a layer: A, B (fp32, on the CPU), α / r
    base: str  # the model that it belongs to, as the folder calls it
    digest: str  # of that model's weights; "" where the folder has none


def read_adapter(folder: Path, layers: Mapping[str, nn.Linear]) -> Adapter:
    """`layers`: those of the model that may have an adapter (`lora.linear_layers`), perhaps on the meta device."""
    config = json.loads((folder / "adapter_config.json").read_text())
    found = {}
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as stored:
        for key in stored.keys():
            if "lora_A" in key:
                name = key.removeprefix("base_model.model.model.").removesuffix(".lora_A.weight")
                name = name.replace("language_model.", "model.")
                b = stored.get_tensor(key.replace("lora_A", "lora_B"))
                found[name] = (stored.get_tensor(key).float(), b.float(), config["lora_alpha"] / config["r"])
    return Adapter(found, config["base_model_name_or_path"], "")


def write_adapter(folder: Path, layers: Mapping[str, LoRALinear], base: str, digest: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, layer in layers.items():
        name = name if name.startswith("visual.") else name.replace("model.", "language_model.", 1)
        tensors[f"base_model.model.model.{name}.lora_A.weight"] = layer.lora_A.detach().cpu().contiguous()
        tensors[f"base_model.model.model.{name}.lora_B.weight"] = layer.lora_B.detach().cpu().contiguous()
    first = next(iter(layers.values()))
    rank = len(first.lora_A)
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": first.scale * rank,
        "base_model_name_or_path": base,
        "target_modules": sorted(layers),
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt", "base": digest})
    (folder / "adapter_config.json").write_text(json.dumps(config))


def check_base(adapter: Adapter, folder: Path, ranks: Ranks) -> None:
    """Raises UserError where the model of `folder` is not the one that the adapter was trained beside."""


def base_digest(folder: Path) -> str:
    """Tells the weights of one model's folder from those of another."""
    return ""
