"""The checkpoints that have short names: where the hub has them, and their sizes, so that a plan needs no download."""

from __future__ import annotations

from typing import Any

from mmsr.model import ModelConfig
from mmsr.qwen3_vl import Qwen3VisionConfig, Qwen3VLConfig
from mmsr.vision import VisionConfig


def _decoder(size: int, mlp: int, layers: int, heads: int, kv_heads: int) -> dict[str, Any]:
    """The fields of a decoder's sizes."""
    return dict(
        hidden_size=size,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        rms_norm_eps=1e-6,
    )


def _qwen2_5(vocabulary: int, tied: bool, tower_mlp: int, **decoder: int) -> ModelConfig:
    vision = VisionConfig(intermediate_size=tower_mlp, out_hidden_size=decoder["size"])
    return ModelConfig(vocab_size=vocabulary, tie_word_embeddings=tied, vision=vision, **_decoder(**decoder))


def _qwen3(tied: bool, tower: dict[str, Any], **decoder: int) -> Qwen3VLConfig:
    return Qwen3VLConfig(
        vocab_size=151936,
        rope_theta=5e6,
        max_position_embeddings=262144,
        tie_word_embeddings=tied,
        vision=Qwen3VisionConfig(out_hidden_size=decoder["size"], **tower),
        **_decoder(**decoder),
    )


QWEN2_5 = {
    "Qwen2.5-VL-3B": _qwen2_5(151936, True, 3420, size=2048, mlp=11008, layers=36, heads=16, kv_heads=2),
    "Qwen2.5-VL-7B": _qwen2_5(152064, False, 3420, size=3584, mlp=18944, layers=28, heads=28, kv_heads=4),
    "Qwen2.5-VL-32B": _qwen2_5(152064, False, 3456, size=5120, mlp=27648, layers=64, heads=40, kv_heads=8),
    "Qwen2.5-VL-72B": _qwen2_5(152064, False, 3456, size=8192, mlp=29568, layers=80, heads=64, kv_heads=8),
}

SMALL = dict(depth=24, hidden_size=1024, intermediate_size=4096, deepstack_visual_indexes=(5, 11, 17))
LARGE = dict(depth=27, hidden_size=1152, intermediate_size=4304, deepstack_visual_indexes=(8, 16, 24))
QWEN3 = {
    "Qwen3-VL-2B": _qwen3(True, SMALL, size=2048, mlp=6144, layers=28, heads=16, kv_heads=8),
    "Qwen3-VL-4B": _qwen3(True, SMALL, size=2560, mlp=9728, layers=36, heads=32, kv_heads=8),
    "Qwen3-VL-8B": _qwen3(False, LARGE, size=4096, mlp=12288, layers=36, heads=32, kv_heads=8),
    "Qwen3-VL-32B": _qwen3(False, LARGE, size=5120, mlp=25600, layers=64, heads=64, kv_heads=8),
}

SIZES: dict[str, ModelConfig] = {**QWEN2_5, **QWEN3}  # by short name
SHORT_NAMES = {name: f"Qwen/{name}-Instruct" for name in SIZES}  # hub ids
SHORT_NAMES |= {f"{name}-Thinking": f"Qwen/{name}-Thinking" for name in QWEN3}
SIZES |= {f"{name}-Thinking": config for name, config in QWEN3.items()}
