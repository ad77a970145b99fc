"""Write a Hugging Face folder: config.json, weights in shards, and copies of the tokenizer's files.

Every file is written under a temporary name and then renamed, weights before the config that makes them loadable.
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

SHARD_BYTES = 5 * 10**9
SIDE_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template.json", "chat_template.jinja"),
    *("preprocessor_config.json", "generation_config.json"),
)


def write_folder(
    folder: Path,
    config: dict[str, Any],
    weights: dict[str, Tensor],
    tokenizer_files_from: Path | str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write weights by name, the values of config.json, and copies of another folder's tokenizer files."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_weights(weights, folder, shard_bytes)
    _copy_side_files(tokenizer_files_from, folder)
    _write_json(folder / "config.json", config)


def _write_weights(weights: dict[str, Tensor], folder: Path, shard_bytes: int) -> None:
    stale = set(folder.glob("model*.safetensors*"))
    shards = _shards(weights, shard_bytes)
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = ["model.safetensors"]
    for name, shard in zip(names, shards):
        with _replacing(folder / name) as temporary:
            save_file(shard, temporary, metadata={"format": "pt"})
    if len(shards) > 1:
        weight_map = {weight: name for name, shard in zip(names, shards) for weight in shard}
        size = sum(tensor.nbytes for tensor in weights.values())
        names.append("model.safetensors.index.json")
        _write_json(folder / names[-1], {"metadata": {"total_size": size}, "weight_map": weight_map})
    for file in stale - {folder / name for name in names}:
        file.unlink()  # of an earlier save: it would be read in place of these


def _shards(weights: dict[str, Tensor], limit: int) -> list[dict[str, Tensor]]:
    """Cut by order into parts of at most `limit` bytes, a tensor larger than that alone in its part."""
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
    """A temporary path to write, which then takes the place of `file`."""
    temporary = file.with_name(f".{file.name}.tmp")
    yield temporary
    os.replace(temporary, file)
