"""Writes a Hugging Face folder: config.json, weights in shards, and copies of the tokenizer's files.

Every file is written under a temporary name and then renamed, and config.json, which makes the weights loadable, comes
last. huggingface_hub's `save_torch_state_dict` writes the same files, but in place, after it has deleted the old ones:
a run that is killed there would leave no model.
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator

from safetensors.torch import save_file
from torch import Tensor

from mmsr.model import ModelConfig, VLModel
from mmsr.pretrained.weights import nested_name

SHARD_BYTES = 5 * 10**9
SIDE_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "generation_config.json",
)


def save(model: VLModel, folder: Path | str, tokenizer_files_from: Path | str | None = None) -> None:
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
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    dtype = next(iter(weights.values())).dtype
    if config.nested_names:
        weights = {nested_name(name): weight for name, weight in weights.items()}
    _write_weights(weights, folder, shard_bytes)
    _copy_side_files(tokenizer_files_from, folder)
    _write_json(folder / "config.json", {**config.to_dict(), "torch_dtype": str(dtype).removeprefix("torch.")})


def _write_weights(weights: dict[str, Tensor], folder: Path, shard_bytes: int) -> None:
    """One model.safetensors, or numbered shards with an index that says which weight is in which file."""
    earlier = set(folder.glob("model*.safetensors*"))
    shards = _shards(weights, shard_bytes)
    written = set()
    weight_map = {}
    for i, shard in enumerate(shards):
        name = f"model-{i + 1:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        with _replacing(folder / name) as temporary:
            save_file(shard, temporary, metadata={"format": "pt"})
        written.add(folder / name)
        weight_map |= dict.fromkeys(shard, name)
    if len(shards) > 1:
        index = folder / "model.safetensors.index.json"
        size = sum(tensor.nbytes for tensor in weights.values())
        _write_json(index, {"metadata": {"total_size": size}, "weight_map": weight_map})
        written.add(index)
    for file in earlier - written:
        file.unlink()  # of an earlier save: it would be read in place of these


def _shards(weights: dict[str, Tensor], limit: int) -> list[dict[str, Tensor]]:
    """The weights in order, in parts of at most `limit` bytes. A tensor larger than that has a part of its own."""
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
    """A temporary path to write; then it is renamed to `file`. The next save overwrites what a killed one left there.

    So it is not `files.beside`, whose name has the process in it: gigabytes of every killed save would stay.
    """
    temporary = file.with_name(f".{file.name}.tmp")
    yield temporary
    umask = os.umask(0)  # it can only be read by setting it
    os.umask(umask)
    temporary.chmod(0o666 & ~umask)  # safetensors lets only its owner read a file
    os.replace(temporary, file)
