"""Models and files from the Hugging Face hub, or from its cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmsr.system.errors import UserError, first_line
from mmsr.system.progress import MinuteLines, on_terminal

SHORT_NAMES = {f"Qwen2.5-VL-{size}B": f"Qwen/Qwen2.5-VL-{size}B-Instruct" for size in (3, 7, 32, 72)}


def resolve(name: str) -> Path:
    """The folder that `--model NAME` means: a folder, a short name such as Qwen2.5-VL-7B, or a hub id.

    The latter two are downloaded unless they are in the hub's cache. Raises UserError if they cannot be.
    """
    if Path(name).is_dir():
        return Path(name)
    repository = SHORT_NAMES.get(name, name)
    return fetched(
        "snapshot_download",
        f"model {name!r} is not a folder, and {repository!r}",
        "check the name and the network, or pass a local folder",
        repo_id=repository,
        allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"],
    )


def fetched(function: str, what: str, advice: str, **where: Any) -> Path:
    """The path that a download function of huggingface_hub, given by name, returns for the arguments `where`.

    Its own settings apply: HF_HOME, HF_HUB_OFFLINE, HF_TOKEN, HF_ENDPOINT. Raises UserError "what … : advice".
    """
    import huggingface_hub  # slow to import, and not needed for local files

    if not on_terminal():
        where["tqdm_class"] = MinuteLines  # instead of its own bars
    try:
        return Path(getattr(huggingface_hub, function)(**where))
    except Exception as error:  # of the hub's client, its HTTP library or the file system
        raise UserError(
            f"{what} could not be fetched from the Hugging Face hub ({first_line(error)}): {advice}"
        ) from error
