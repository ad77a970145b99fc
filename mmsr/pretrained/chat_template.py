"""The chat template of a Hugging Face folder: whether it begins the thoughts of a model that thinks.

`chat.py` writes the turns itself, because a template knows nothing of untrusted text. All that it has to be told is
what the template adds where the model begins to write.
"""

from __future__ import annotations

from pathlib import Path

from mmsr.pretrained.weights import read_object

FILES = ("chat_template.json", "tokenizer_config.json")  # whose key `chat_template` may have it


def begins_thoughts(folder: Path) -> bool:
    """Whether the template writes `<think>` where the model begins, and leaves it open. Raises UserError.

    Instruct checkpoints do not. Templates that can close it again, as Qwen3's, leave it to the model as a rule.
    """
    begin = chat_template(folder).rpartition("add_generation_prompt")[2]
    return "<think>" in begin and "</think>" not in begin


def chat_template(folder: Path) -> str:
    """The template of a folder; "" where it has none. Of several by name the one called "default"."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8", errors="replace")
    for name in FILES:
        found = read_object(folder / name).get("chat_template") if (folder / name).is_file() else None
        if isinstance(found, list):
            usual = [each.get("template") for each in found if isinstance(each, dict) and each.get("name") == "default"]
            found = usual[0] if usual else None
        if isinstance(found, str):
            return found
    return ""
