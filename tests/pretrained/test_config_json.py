"""config.json: both forms are read alike, and what this program does not build is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import each_family, edit_json, tiny_config

from mmsr.model import ModelConfig, Qwen2_5_VL
from mmsr.pretrained.config_json import model_config, read_config
from mmsr.pretrained.published import SIZES
from mmsr.system.errors import UserError


def test_the_hub_and_transformers_forms_are_read_differently():
    config = tiny_config(tie_word_embeddings=True)
    flat = config.to_dict()
    nested = {key: flat[key] for key in ("model_type", "image_token_id", "video_token_id", "vision_config")}
    nested |= {key: flat[key] for key in ("vision_start_token_id", "vision_end_token_id", "tie_word_embeddings")}
    text = {key: value for key, value in flat.items() if key not in (*nested, "rope_scaling", "rope_theta")}
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e6}
    assert model_config(nested | {"text_config": text | {"rope_parameters": rope}}) == config
    assert model_config(json.loads(json.dumps(flat))) == config


def hub_config(size, intermediate, layers, heads, kv_heads, vocabulary, tied) -> dict:
    """config.json as published, with keys that mean nothing here."""
    vision = {"depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16}
    vision |= {"in_chans": 3, "out_hidden_size": size, "patch_size": 14, "spatial_merge_size": 2, "window_size": 112}
    vision |= {"spatial_patch_size": 14, "fullatt_block_indexes": [7, 15, 23, 31], "temporal_patch_size": 2}
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "hidden_act": "silu",
        "hidden_size": size,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "sliding_window": 32768,
        "use_sliding_window": False,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "vision_config": vision,
        "vocab_size": vocabulary,
    }


def billions_of_parameters(module: torch.nn.Module) -> float:
    return round(sum(parameter.numel() for parameter in module.parameters()) / 1e9, 3)


@pytest.mark.parametrize(
    "sizes, total, tower",
    [
        ((3584, 18944, 28, 28, 4, 152064, False), 8.292, 0.677),  # 7B
        ((2048, 11008, 36, 16, 2, 151936, True), 3.755, 0.669),  # 3B
    ],
)
def test_a_published_size_has_another_number_of_parameters(sizes, total, tower):
    with torch.device("meta"):
        model = Qwen2_5_VL(model_config(hub_config(*sizes)))
    assert billions_of_parameters(model) == total
    assert billions_of_parameters(model.visual) == tower


def hub_config_qwen3(size, intermediate, layers, heads, tied, depth, tower, tower_mlp, levels) -> dict:
    """Qwen3-VL's config.json as published."""
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "image_token_id": 151655,
        "model_type": "qwen3_vl",
        "text_config": {
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 151643,
            "dtype": "bfloat16",
            "eos_token_id": 151645,
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": size,
            "initializer_range": 0.02,
            "intermediate_size": intermediate,
            "max_position_embeddings": 262144,
            "model_type": "qwen3_vl_text",
            "num_attention_heads": heads,
            "num_hidden_layers": layers,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-06,
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
            "rope_theta": 5000000,
            "tie_word_embeddings": tied,
            "use_cache": True,
            "vocab_size": 151936,
        },
        "tie_word_embeddings": tied,
        "transformers_version": "4.57.0.dev0",
        "video_token_id": 151656,
        "vision_config": {
            "deepstack_visual_indexes": levels,
            "depth": depth,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": tower,
            "in_channels": 3,
            "initializer_range": 0.02,
            "intermediate_size": tower_mlp,
            "model_type": "qwen3_vl",
            "num_heads": 16,
            "num_position_embeddings": 2304,
            "out_hidden_size": size,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        "vision_end_token_id": 151653,
        "vision_start_token_id": 151652,
    }


PUBLISHED_QWEN3 = {
    "Qwen3-VL-2B": (2048, 6144, 28, 16, True, 24, 1024, 4096, [5, 11, 17]),
    "Qwen3-VL-4B": (2560, 9728, 36, 32, True, 24, 1024, 4096, [5, 11, 17]),
    "Qwen3-VL-8B": (4096, 12288, 36, 32, False, 27, 1152, 4304, [8, 16, 24]),
    "Qwen3-VL-32B": (5120, 25600, 64, 64, False, 27, 1152, 4304, [8, 16, 24]),
}


@pytest.mark.parametrize("name", PUBLISHED_QWEN3)
def test_the_published_file_has_other_sizes_than_the_plan_or_is_written_otherwise(name, tmp_path):
    from transformers import AutoConfig

    values = hub_config_qwen3(*PUBLISHED_QWEN3[name])
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = read_config(tmp_path)
    assert config == SIZES[name] == SIZES[f"{name}-Thinking"]
    written = json.loads(json.dumps(config.to_dict()))
    for part in ("text_config", "vision_config"):
        left_out = {"attention_dropout", "dtype", "initializer_range", "use_cache"}
        assert {key: value for key, value in values[part].items() if key not in left_out} == {
            key: value for key, value in written[part].items() if key in values[part]
        }
    ours, theirs = (AutoConfig.for_model(**found).to_dict() for found in (written, values))
    for part in ("text_config", "vision_config"):
        assert {key for key in theirs[part] if theirs[part][key] != ours[part].get(key)} <= {"dtype"}


def test_keys_missing_from_a_vision_config_are_an_error():
    vision = model_config({"model_type": "qwen2_5_vl", "vision_config": {"hidden_size": 1280}}).vision
    assert (vision.depth, vision.intermediate_size, vision.window_size) == (32, 3420, 112)
    assert vision.fullatt_block_indexes == (7, 15, 23, 31) and vision.out_hidden_size == 3584


YARN = {"type": "yarn", "factor": 4.0, "mrope_section": [2, 3, 3]}
ANOTHER = [
    (dict(model_type="qwen2_vl"), "model_type is 'qwen2_vl'"),
    (dict(hidden_act="gelu"), "hidden_act is 'gelu'"),
    (dict(use_sliding_window=True), "use_sliding_window is True"),
    (dict(layer_types=["full_attention", "sliding_attention"]), "layer_types is 'sliding_attention'"),
    (dict(layer_types=3), "layer_types is 3"),
    (dict(head_dim=32), "head_dim is 32, this program runs 16 only"),
    (dict(partial_rotary_factor=0.5), "partial_rotary_factor is 0.5"),
    (dict(rope_scaling=YARN), "rope type is 'yarn'"),
    (dict(rope_scaling=None, rope_parameters=YARN), "rope type is 'yarn'"),
    (dict(rope_parameters=YARN), "rope type is 'yarn'"),
    (dict(rope_scaling={**YARN, "rope_type": "default"}), "rope type is 'yarn'"),
    (dict(text_config={"rope_parameters": {"rope_type": "linear", "factor": 2.0}}), "rope type is 'linear'"),
    (dict(rope_scaling={"type": "mrope", "partial_rotary_factor": 0.5}), "partial_rotary_factor is 0.5"),
    (dict(vision_config={"patch_size": 16}), "patch_size is 16"),
    (dict(vision_config={"in_chans": 4}), "in_channels is 4"),
    (dict(vision_config={"hidden_act": "gelu"}), "vision_config.hidden_act is 'gelu'"),
]
ODD_VALUES = ["64", 0, -64, 64.5, 64.0, True, [64], {}, 10**12, float("inf"), float("nan")]
ODD = [
    *((dict(hidden_size=value), "hidden_size is .*, it must be a whole number from 1 to") for value in ODD_VALUES),
    *((dict(vocab_size=value), "vocab_size is ") for value in ("300", 0, 3e2)),
    *((dict(num_hidden_layers=value), "num_hidden_layers is ") for value in (0, "2", 10**5)),
    *((dict(num_attention_heads=value), "num_attention_heads is ") for value in (0, -4, 4.0)),
    *((dict(num_key_value_heads=value), "num_key_value_heads is ") for value in (0, "2", True)),
    *((dict(rms_norm_eps=value), "rms_norm_eps is ") for value in (float("nan"), -1e-6, 0, "1e-6", 3.0)),
    *((dict(rope_theta=value), "rope_theta is ") for value in (0, float("nan"), -1e6, "1e6", float("inf"), True)),
    *((dict(rope_scaling={"rope_theta": value}), "rope_theta is ") for value in (0, "1e6")),
    *((dict(rope_scaling={"mrope_section": value}), "mrope_section ") for value in ([2, 3, 4], [8], [], 8, "233")),
    *((dict(rope_scaling={"mrope_section": value}), "mrope_section ") for value in ([2, 3, 3.0], [-2, 5, 5], [8, [0]])),
    *((dict(image_token_id=value), "image_token_id is ") for value in (-1, "290", 290.0)),
    *((dict([(f"{name}_token_id", 300)]), "must be below vocab_size 300") for name in ("image", "vision_end")),
    *((dict([(f"{name}_token_id", 292)]), r"ids \(.*\) must differ") for name in ("image", "video", "vision_end")),
    (dict(num_attention_heads=3), "num_attention_heads must divide hidden_size"),
    (dict(num_key_value_heads=3), "num_key_value_heads must divide num_attention_heads"),
    (dict(tie_word_embeddings="false"), "tie_word_embeddings is 'false', not true or false"),
    (dict(text_config={"tie_word_embeddings": 1}), "tie_word_embeddings is 1"),
    *(
        (dict([(name, [1])]), f"{name} is a JSON list, not")
        for name in ("vision_config", "text_config", "rope_scaling")
    ),
    (dict(vision_config={"depth": 10**5}), "vision_config.depth is 100000"),
    (dict(vision_config={"fullatt_block_indexes": 1}), "fullatt_block_indexes is 1, it must be a list"),
    (dict(vision_config={"num_heads": 3}), "vision_config: 4 . num_heads must divide"),
    (dict(vision_config={"out_hidden_size": 65}), "out_hidden_size must be hidden_size"),
    (dict(vision_config={"out_hidden_size": 64, "window_size": 100}), "window_size must be a multiple of 28"),
]


ROPE3 = {"rope_type": "default", "mrope_section": [4, 4, 4]}
OTHER_QWEN3 = [  # changes of the file, of its text_config and of its vision_config
    (dict(model_type="qwen3_vl_moe"), {}, {}, "'qwen3_vl_moe', a mixture of experts, this program runs"),
    ({}, dict(attention_bias=True), {}, "attention_bias is True"),
    ({}, dict(head_dim=25), {}, "mrope_section must be three numbers with the sum 12.5, half a head"),
    ({}, dict(head_dim="24"), {}, "head_dim is '24', it must be a whole number"),
    ({}, dict(rope_scaling={**ROPE3, "mrope_interleaved": False}), {}, "mrope_interleaved is False"),
    ({}, dict(rope_scaling={**ROPE3, "mrope_section": [2, 5, 5]}), {}, "none may be larger than the first"),
    ({}, dict(rope_scaling={**ROPE3, "rope_type": "yarn"}), {}, "rope type is 'yarn'"),
    ({}, {}, dict(hidden_act="silu"), "vision_config.hidden_act is 'silu'"),
    ({}, {}, dict(patch_size=14), "patch_size is 14"),
    ({}, {}, dict(num_position_embeddings=35), "num_position_embeddings must be a square"),
    ({}, {}, dict(deepstack_visual_indexes=[2, 0]), "some of the 3 blocks, in order"),
    ({}, {}, dict(deepstack_visual_indexes=[0, 3]), "some of the 3 blocks, in order"),
    ({}, {}, dict(depth=9, deepstack_visual_indexes=[0, 2, 4, 6]), "more than num_hidden_layers, 3"),
]


@pytest.mark.parametrize("whole, text, vision, message", OTHER_QWEN3)
def test_another_qwen3_vl_runs_with_wrong_results(whole, text, vision, message, tmp_path, monkeypatch):
    monkeypatch.setattr("helpers.FAMILY", "qwen3")
    values = tiny_config().to_dict()
    values |= whole
    values["text_config"] |= text
    values["vision_config"] |= vision
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=message) as caught:
        read_config(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("change, message", [*ANOTHER, *ODD])
def test_another_architecture_runs_with_wrong_results_or_an_odd_one_gives_a_traceback(change, message, tmp_path):
    save_config(tiny_config(), tmp_path)
    edit_json(tmp_path / "config.json", **change)
    with pytest.raises(UserError, match=message) as caught:
        read_config(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def save_config(config: ModelConfig, folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(config.to_dict()))


@each_family
def test_pictures_are_prepared_otherwise_than_the_folder_says(tmp_path):
    """preprocessor_config.json as published is taken, another is refused."""
    save_config(tiny_config(), tmp_path)
    processor = tiny_config().vision.processor
    published = {
        "size": {"longest_edge": 16777216, "shortest_edge": 65536},
        "patch_size": processor.patch,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": list(processor.mean),
        "image_std": list(processor.std),
        "image_processor_type": "Qwen2VLImageProcessorFast",
    }
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(published))
    assert read_config(tmp_path) == tiny_config()
    for change in (dict(patch_size=15), dict(merge_size=1), dict(image_mean=[0, 0, 0]), dict(image_std=0.5)):
        file.write_text(json.dumps(published | change))
        (name,) = change
        with pytest.raises(UserError, match=f"preprocessor_config.json: {name} is ") as caught:
            read_config(tmp_path)
        assert "\n" not in str(caught.value)


def test_key_and_value_heads_that_are_null_are_another_number_than_in_transformers(tmp_path):
    from transformers import Qwen2_5_VLConfig

    save_config(tiny_config(), tmp_path)
    edit_json(tmp_path / "config.json", num_key_value_heads=None)
    theirs = Qwen2_5_VLConfig.from_pretrained(tmp_path).text_config.num_key_value_heads
    assert read_config(tmp_path).num_key_value_heads == theirs == 4


def test_the_folder_of_a_run_is_taken_for_a_model_of_another_kind(tmp_path):
    (tmp_path / "config.json").write_text('{"recipe": "toy"}')
    (tmp_path / "model").mkdir()
    with pytest.raises(UserError, match="is the folder of a run: give the model in it, .*/model$"):
        read_config(tmp_path)
