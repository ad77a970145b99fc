"""Folders that are loaded and saved: round trips here, and with transformers in both directions."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import each_family, hf_logits, hf_twin, largest_difference, of_family, packed_logits, tiny_model
from safetensors import safe_open
from safetensors.torch import save_file
from test_model import sequences

from mmsr.pretrained.load import load
from mmsr.pretrained.save import save, save_weights


def same_weights(one, other) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


@each_family
@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_folder_opens_otherwise_in_transformers(tied, tmp_path):
    from transformers import AutoModelForImageTextToText

    model = tiny_model(tie_word_embeddings=tied)
    save(model, tmp_path)
    twin, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        ours = packed_logits(load(tmp_path), sequences()[1:2])
        assert torch.equal(ours, packed_logits(model, sequences()[1:2]))
        theirs = hf_logits(twin, *sequences()[1])
    assert largest_difference(ours, theirs) < 1e-5 * theirs.abs().max()


@each_family
@pytest.mark.parametrize("tied", [True, False])
def test_a_folder_saved_by_transformers_opens_otherwise_here(tied, tmp_path):
    model = tiny_model(tie_word_embeddings=tied)
    hf_twin(model).save_pretrained(tmp_path)  # nested config.json
    assert "text_config" in json.loads((tmp_path / "config.json").read_text())
    opened = load(tmp_path)
    assert opened.config == model.config and same_weights(opened, model)


@each_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard_bytes", [10**9, 40_000])
def test_a_round_trip_changes_weights(dtype, shard_bytes, tmp_path):
    model = tiny_model().to(dtype)
    save_weights(model.config, model.state_dict(), tmp_path, shard_bytes=shard_bytes)
    shards = list(tmp_path.glob("model-*.safetensors"))
    assert len(shards) == 0 if shard_bytes == 10**9 else len(shards) > 3
    opened = load(tmp_path, dtype)
    assert opened.config == model.config and same_weights(opened, model)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == str(dtype).removeprefix("torch.")


@each_family
def test_saved_weights_have_other_names_than_published_ones(tmp_path):
    """Programs that read a folder themselves, such as vLLM, know the published names alone."""
    model = tiny_model()
    save(model, tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        found = {name.split(".layers.")[0].split(".blocks.")[0] for name in file.keys()}
    decoder, tower = of_family(qwen2_5=("model", "visual"), qwen3=("model.language_model", "model.visual"))
    of_decoder = {decoder, f"{decoder}.embed_tokens.weight", f"{decoder}.norm.weight", "lm_head.weight"}
    assert of_decoder <= found and all(name.startswith(tower) for name in found - of_decoder)


@each_family
def test_a_sharded_folder_does_not_open_in_transformers(tmp_path):
    from transformers import AutoModelForImageTextToText

    model = tiny_model()
    save_weights(model.config, model.state_dict(), tmp_path, shard_bytes=40_000)
    twin = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert torch.equal(twin.lm_head.weight, model.lm_head.weight)


def test_an_earlier_sharded_save_shadows_a_later_one(tmp_path):
    old, new = tiny_model(0), tiny_model(1)
    save_weights(old.config, old.state_dict(), tmp_path, shard_bytes=40_000)
    save(new, tmp_path)
    assert same_weights(load(tmp_path), new)
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    save_weights(old.config, old.state_dict(), tmp_path, shard_bytes=40_000)
    assert same_weights(load(tmp_path), old)


@each_family
def test_in_memory_weight_names_are_not_understood(tmp_path):
    model = tiny_model()
    save(model, tmp_path)
    renamed = {}
    for name, value in model.state_dict().items():
        name = f"model.{name}" if name.startswith("visual.") else name.replace("model.", "model.language_model.", 1)
        renamed[name] = value
    save_file(renamed | {"model.rotary.inv_freq": torch.ones(2)}, tmp_path / "model.safetensors")
    assert same_weights(load(tmp_path), model)


@each_family
def test_tokenizer_files_stay_behind(tmp_path):
    base, out = tmp_path / "base", tmp_path / "out"
    base.mkdir()
    for name in ("tokenizer.json", "chat_template.jinja", "optimizer.pt"):
        (base / name).write_text(name)
    save(tiny_model(), out, tokenizer_files_from=base)
    save(tiny_model(), out, tokenizer_files_from=out)
    assert {f.name for f in out.iterdir()} == {
        *("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja")
    }


def test_a_loaded_parameter_is_on_meta_or_a_view_of_the_file(tmp_path):
    model = tiny_model()
    save(model, tmp_path)
    opened = load(tmp_path)
    save(tiny_model(1), tmp_path)
    with open(tmp_path / "model.safetensors", "r+b") as file:
        file.write(b"\0" * 100_000)
    assert not list(opened.buffers()) and same_weights(opened, model)
    assert all(p.device.type == "cpu" and p.requires_grad and p.is_leaf for p in opened.parameters())


def test_a_load_holds_every_weight_twice(tmp_path, monkeypatch):
    """Ours are the tensors read, not copies of them; a second set of parameters is never allocated."""
    save(tiny_model(), tmp_path)
    read = []
    to = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda *a, **k: read.append(to(*a, **k)) or read[-1])
    opened = load(tmp_path)
    monkeypatch.undo()
    assert {p.data_ptr() for p in opened.parameters()} == {tensor.data_ptr() for tensor in read}


def test_only_its_owner_can_read_a_saved_model(tmp_path):
    save(tiny_model(), tmp_path / "model")
    (tmp_path / "usual").touch()
    modes = {file.stat().st_mode for file in [*(tmp_path / "model").iterdir(), tmp_path / "usual"]}
    assert len(modes) == 1
