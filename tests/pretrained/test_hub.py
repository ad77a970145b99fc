"""What `--model NAME` means."""

import pytest

from mmsr.pretrained.hub import resolve
from mmsr.system.errors import UserError


def test_a_model_name_means_another_checkpoint(tmp_path, monkeypatch):
    asked = []

    def fetch(repo_id, allow_patterns, **how):
        asked.append(repo_id)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert resolve(str(tmp_path)) == resolve("Qwen2.5-VL-7B") == resolve("someone/tuned") == tmp_path
    assert asked == ["Qwen/Qwen2.5-VL-7B-Instruct", "someone/tuned"]


def test_a_model_that_cannot_be_fetched_gives_a_traceback(monkeypatch):
    def fail(*_, **__):
        raise ConnectionError("no route\nmore lines")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(UserError, match="Qwen/Qwen2.5-VL-3B-Instruct.*no route.*local folder") as caught:
        resolve("Qwen2.5-VL-3B")
    assert "\n" not in str(caught.value)
