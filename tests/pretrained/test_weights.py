"""Folders that are unfit: quantised, adapters, damaged, tampered with, or of another model than their config.json."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import edit_json, tiny_config, tiny_model
from safetensors.torch import load_file, save_file

from mmsr.pretrained.config_json import model_config
from mmsr.pretrained.load import load, skeleton
from mmsr.pretrained.save import save, save_weights
from mmsr.pretrained.weights import FULL, QUANTISED
from mmsr.system.errors import UserError

WEIGHT = "model.layers.0.mlp.up_proj.weight"  # (96, 64)


def rewrite(folder: Path, change) -> None:
    """`change` of the weights by name, in place."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def holds(*without: str, **tensors: torch.Tensor):
    """Weights of the first projection: `weight`, or what a quantiser has in its place, after the projection's name."""

    def spoil(folder: Path):
        def change(weights):
            for name in without:
                del weights[name]
            weights.update(
                {WEIGHT.replace("weight", name.replace("__", ".")): value for name, value in tensors.items()}
            )

        rewrite(folder, change)

    return spoil


def edits(name: str = "config.json", **values):
    return lambda folder: edit_json(folder / name, **values)


def writes(name: str, text: str):
    return lambda folder: (folder / name).write_text(text)


def truncate(folder: Path):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def only(name: str, text: str = "{}"):
    """The folder with another file in place of its weights."""

    def spoil(folder: Path):
        (folder / "model.safetensors").unlink()
        (folder / name).write_text(text)

    return spoil


def sharded(change=lambda weight_map: weight_map):
    """The folder in shards, with `change` of the index's map."""

    def spoil(folder: Path):
        model = load(folder)
        save_weights(model.config, model.state_dict(), folder, shard_bytes=40_000)
        index = folder / "model.safetensors.index.json"
        edit_json(index, weight_map=change(json.loads(index.read_text())["weight_map"]))

    return spoil


def all_in(name):
    return sharded(lambda weight_map: dict.fromkeys(weight_map, name))


def lose_shard(folder: Path):
    sharded()(folder)
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def poison(value: float, dtype: torch.dtype = torch.float32):
    def change(weights):
        weights[WEIGHT] = weights[WEIGHT].to(dtype)
        weights[WEIGHT][95, 63] = value

    return lambda folder: rewrite(folder, change)


def one_more(name: str):
    return lambda folder: rewrite(folder, lambda weights: weights.update({name: torch.ones(64)}))


def renamed(old: str, new: str):
    def change(weights):
        for name in [name for name in weights if old in name]:
            weights[name.replace(old, new, 1)] = weights.pop(name)

    return lambda folder: rewrite(folder, change)


def rewrites(name: str, value: torch.Tensor):
    return lambda folder: rewrite(folder, lambda weights: weights.update({name: value}))


def cut_off_but_as_long(folder: Path):
    """A download that was broken off, by a program that makes the file as long as it will be."""
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    begin = 8 + int.from_bytes(whole[:8], "little") + 1000  # the header, and some of the numbers
    file.write_bytes(whole[:begin].ljust(len(whole), b"\0"))


def adapter(base: dict):
    def spoil(folder: Path):
        for file in folder.iterdir():
            file.unlink()
        (folder / "adapter_config.json").write_text(json.dumps(base))
        save_file({"base_model.model.x.lora_A.weight": torch.ones(1)}, folder / "adapter_model.safetensors")

    return spoil


FP8, I8, U8, I32 = (dict(dtype=getattr(torch, name)) for name in ("float8_e4m3fn", "int8", "uint8", "int32"))
QUANTISED_FOLDERS = {
    "FP8 by blocks": holds(weight=torch.ones(96, 64).to(**FP8), weight_scale_inv=torch.ones(1, 1)),
    "FP8 by tensor": holds(weight=torch.ones(96, 64).to(**FP8), weight_scale=torch.ones(1)),
    "FP8 without scales": holds(weight=torch.ones(96, 64).to(**FP8)),
    "FP8 of the other kind": holds(weight=torch.ones(96, 64).to(torch.float8_e5m2)),
    "bitsandbytes, 8 bits": holds(weight=torch.ones(96, 64, **I8), SCB=torch.ones(96)),
    "bitsandbytes, 4 bits": holds(weight=torch.ones(3072, 1, **U8), weight__absmax=torch.ones(96)),
    "whole numbers alone": holds(weight=torch.ones(96, 64, **I8)),
    "scales beside full weights": holds(weight_scale=torch.ones(96, 1)),
    "GPTQ": holds(WEIGHT, qweight=torch.ones(8, 96, **I32), qzeros=torch.ones(1, **I32), scales=torch.ones(1)),
    "compressed-tensors": holds(WEIGHT, weight_packed=torch.ones(96, 8, **I32), weight_scale=torch.ones(96, 1)),
    "config.json's word": edits(quantization_config={"quant_method": "fp8"}),
    "config.json's word in text_config": edits(text_config={"quantization_config": {"load_in_4bit": True}}),
    "an earlier word for it": edits(compression_config={"format": "pack-quantized"}),
    "AWQ's own file": writes("quant_config.json", "{}"),
    "a GGUF file": only("model-Q4_K_M.gguf"),
}


@pytest.mark.parametrize("what", QUANTISED_FOLDERS)
def test_quantised_weights_compute_noise_or_are_fetched_again(what, tmp_path):
    refused(QUANTISED_FOLDERS[what], f"quantised.*{FULL}", tmp_path)


def test_the_names_of_a_published_model_are_taken_for_a_quantisers():
    assert not [name for name in tiny_model().state_dict() if QUANTISED.search(name)]


UNFIT = {
    "no config.json": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "config.json is not JSON": (writes("config.json", "{"), "not valid JSON"),
    "config.json is a list": (writes("config.json", "[]"), "not an object"),
    "config.json is deep": (writes("config.json", "[" * 100_000), "not valid JSON"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "neither model.safetensors nor"),
    "pickled weights": (only("pytorch_model.bin"), "pickled weights.*safetensors"),
    "truncated": (truncate, "truncated or corrupt"),
    "not safetensors": (writes("model.safetensors", "<html>rate limited</html>"), "truncated or corrupt"),
    "empty": (writes("model.safetensors", ""), "truncated or corrupt"),
    "a header that is too long": (writes("model.safetensors", "\x7f" * 64), "truncated or corrupt"),
    "an adapter": (adapter({"base_model_name_or_path": "Qwen/Qwen2.5-VL-7B"}), "an adapter of Qwen/Qwen2.5-VL-7B, not"),
    "an adapter of nothing": (adapter({}), "an adapter of another model, not a model: give it as --adapter"),
    "an adapter's weights": (
        one_more("base_model.model.q_proj.lora_A.weight"),
        "is an adapter's: save it .* --adapter DIR",
    ),
    "what LoRA wrapped": (renamed("q_proj.weight", "q_proj.base_layer.weight"), "is an adapter's: save it"),
    "a head that PEFT kept": (renamed("lm_head", "lm_head.modules_to_save.default"), "is an adapter's: save it"),
    "DoRA": (one_more("model.norm.lora_magnitude_vector"), "is an adapter's: save it"),
    "IA3": (one_more("model.norm.ia3_l"), "is an adapter's: save it"),
    "names of a compiled model": (
        renamed("", "_orig_mod."),
        r"69 of 69 weights are missing \(.*and there is no place for others \(_orig_mod\.lm_head\.weight, ",
    ),
    "a head elsewhere": (
        renamed("lm_head", "model.lm_head"),
        r"1 of 69 .* no place for others \(model\.lm_head\.weight\)",
    ),
    "weights left on other processes": (holds(weight=torch.empty(0)), f"{WEIGHT} is empty: .*gathered"),
    "a shared-out checkpoint": (only("model_world_size_8_rank_0.pt"), "pickled weights"),
    "Git LFS's note": (writes("model.safetensors", "version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "a file whose end never came": (cut_off_but_as_long, "zeros only: .*not fetched whole"),
    "a norm of zeros": (rewrites("model.norm.weight", torch.zeros(64)), "model.norm.weight holds zeros only"),
    "a number beyond floats": (
        rewrites(WEIGHT, torch.full((96, 64), 1e300, dtype=torch.float64)),
        f"{WEIGHT} holds NaN or infinite",
    ),
    "another size": (
        edits(intermediate_size=128),
        r"down_proj.weight has shape \(64, 96\), config.json says \(64, 128\)",
    ),
    "a layer too few": (edits(num_hidden_layers=3), r"12 of \d+ weights are missing \(model\.layers\.2\."),
    "a layer too many": (edits(num_hidden_layers=1), r"12 weights have no place .* \(model\.layers\.1\."),
    "a block too many": (
        edits(vision_config={**tiny_model().config.to_dict()["vision_config"], "depth": 2}),
        r"12 weights have no place .* \(visual\.blocks\.2\.",
    ),
    "a value head": (one_more("v_head.summary.weight"), r"1 weights have no place .* \(v_head.summary.weight\)"),
    "a name of two lines": (one_more("a\nb" + 300 * "c"), r"1 weights have no place .* \(a bc{117}\)"),
    "a weight twice": (one_more("model.language_model.norm.weight"), "model.norm.weight is in model.safetensors too"),
    "NaN": (poison(float("nan")), f"{WEIGHT} holds NaN or infinite"),
    "infinity": (poison(float("inf"), torch.bfloat16), f"{WEIGHT} holds NaN or infinite"),
    "minus infinity": (poison(-float("inf"), torch.float16), f"{WEIGHT} holds NaN or infinite"),
    "shard missing": (lose_shard, "model-00002-of"),
    "an index without a map": (only("model.safetensors.index.json"), "weight_map does not name"),
    "an index that is null": (only("model.safetensors.index.json", "null"), "a JSON NoneType, not an object"),
    "an index that is deep": (only("model.safetensors.index.json", '{"a":' * 100_000), "not valid JSON"),
    "a map that is null": (sharded(lambda _: None), "weight_map does not name"),
    "a map that is empty": (sharded(lambda _: {}), "weight_map does not name"),
    "a map that is a list": (sharded(list), "weight_map does not name"),
    "a map of numbers": (all_in(3), "weight_map does not name"),
    "a map of lists": (all_in(["model.safetensors"]), "weight_map does not name"),
    "a shard outside": (all_in("../model-00001.safetensors"), "weight_map does not name"),
    "a shard anywhere": (all_in("/etc/hostname"), "weight_map does not name"),
    "a shard of a long name": (all_in(300 * "a" + ".safetensors"), "weight_map does not name"),
    "a shard that is a folder": (all_in(".."), "weight_map does not name"),
    "pickled shards": (all_in("pytorch_model.bin"), "weight_map does not name"),
}


@pytest.mark.parametrize("what", UNFIT)
def test_an_unfit_folder_is_taken_or_gives_a_traceback(what, tmp_path):
    refused(*UNFIT[what], tmp_path)


def refused(spoil, message: str, folder: Path) -> None:
    save(tiny_model(), folder)
    spoil(folder)
    with pytest.raises(UserError, match=message) as caught:
        load(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_folder_gives_a_traceback(tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist"):
        load(tmp_path / "nowhere")


def test_a_folder_is_refused_after_its_weights_are_read(tmp_path, monkeypatch):
    """What headers tell is told before the memory plan and before minutes of reading."""
    save(tiny_model(), tmp_path)
    monkeypatch.setattr("mmsr.pretrained.weights._tensor", lambda _: pytest.fail("read"))
    monkeypatch.setattr("mmsr.pretrained.load.tensors", lambda _: pytest.fail("read"))
    assert all(parameter.is_meta for parameter in skeleton(tmp_path).parameters())
    holds(weight=torch.ones(96, 64, **I8))(tmp_path)
    with pytest.raises(UserError, match="quantised"):
        skeleton(tmp_path)


# ---- what ties the head to the embedding

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
STORED = {
    "no head": lambda weights: weights.pop(HEAD),
    "the embedding": lambda weights: weights.update({HEAD: weights[EMBEDDING].clone()}),
    "another head": lambda weights: None,
    "a head alone": lambda weights: weights.pop(EMBEDDING),
}
FLAGS = (True, False, None)  # None: there is no such key


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("outer", FLAGS)
@pytest.mark.parametrize("inner", FLAGS)
def test_the_flag_that_ties_is_read_otherwise_than_by_transformers(nested, outer, inner, tmp_path):
    """In the hub's form (where there is no inner one) and in transformers 5's."""
    from transformers import Qwen2_5_VLConfig

    values = tiny_config().to_dict()
    del values["tie_word_embeddings"]
    if nested:
        values["text_config"] = {key: values.pop(key) for key in ("hidden_size", "rope_scaling", "rope_theta")}
        values["text_config"] |= {} if inner is None else {"tie_word_embeddings": inner}
    values |= {} if outer is None else {"tie_word_embeddings": outer}
    theirs = Qwen2_5_VLConfig(**json.loads(json.dumps(values))).tie_word_embeddings
    assert model_config(values).tie_word_embeddings == theirs


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("tied", [True, False])
def test_a_head_is_tied_otherwise_than_in_transformers(tied, stored, tmp_path):
    from transformers import Qwen2_5_VLForConditionalGeneration

    save(tiny_model(tie_word_embeddings=False), tmp_path)
    rewrite(tmp_path, STORED[stored])
    edit_json(tmp_path / "config.json", tie_word_embeddings=tied)
    twin, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    if info["missing_keys"]:  # transformers then warns and makes some up
        with pytest.raises(UserError, match=r"1 of \d+ weights are missing"):
            load(tmp_path)
        return
    model, embedding = load(tmp_path), twin.model.language_model.embed_tokens.weight
    assert torch.equal(model.head_weight, twin.lm_head.weight)
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    assert (model.lm_head is None) == (twin.lm_head.weight is embedding) == model.config.tie_word_embeddings
    save(model, tmp_path)  # with the flag that fits the weights
    assert torch.equal(load(tmp_path).head_weight, model.head_weight)
