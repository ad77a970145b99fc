"""The checkpoints that have short names: where the hub has them, and their sizes, so that a plan needs no download."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mmsr.model import ModelConfig
from mmsr.qwen3_vl import Qwen3VisionConfig, Qwen3VLConfig
from mmsr.vision import VisionConfig

# In the order of the config classes' fields: vocabulary, widths of the decoder and of its MLP, layers, query heads,
# key/value heads, epsilon.
QWEN2_5 = {
    "Qwen2.5-VL-3B": ModelConfig(
        *(151936, 2048, 11008, 36, 16, 2, 1e-6), tie_word_embeddings=True, vision=VisionConfig(out_hidden_size=2048)
    ),
    "Qwen2.5-VL-7B": ModelConfig(152064, 3584, 18944, 28, 28, 4, 1e-6),
    "Qwen2.5-VL-32B": ModelConfig(
        *(152064, 5120, 27648, 64, 40, 8, 1e-6), vision=VisionConfig(intermediate_size=3456, out_hidden_size=5120)
    ),
    "Qwen2.5-VL-72B": ModelConfig(
        *(152064, 8192, 29568, 80, 64, 8, 1e-6), vision=VisionConfig(intermediate_size=3456, out_hidden_size=8192)
    ),
}


def _qwen3(*sizes: Any, tied: bool, vision: Qwen3VisionConfig) -> Qwen3VLConfig:
    config = Qwen3VLConfig(*sizes)
    config = replace(config, rope_theta=5e6, max_position_embeddings=262144)
    return replace(config, tie_word_embeddings=tied, vision=vision)


def _small_tower(out: int) -> Qwen3VisionConfig:
    return Qwen3VisionConfig(24, 1024, 4096, 16, out, deepstack_visual_indexes=(5, 11, 17))


QWEN3 = {
    "Qwen3-VL-2B": _qwen3(151936, 2048, 6144, 28, 16, 8, tied=True, vision=_small_tower(2048)),
    "Qwen3-VL-4B": _qwen3(151936, 2560, 9728, 36, 32, 8, tied=True, vision=_small_tower(2560)),
    "Qwen3-VL-8B": _qwen3(
        *(151936, 4096, 12288, 36, 32, 8), tied=False, vision=Qwen3VisionConfig(out_hidden_size=4096)
    ),
    "Qwen3-VL-32B": _qwen3(
        *(151936, 5120, 25600, 64, 64, 8), tied=False, vision=Qwen3VisionConfig(out_hidden_size=5120)
    ),
}

SIZES: dict[str, ModelConfig] = {**QWEN2_5, **QWEN3}  # by short name
SHORT_NAMES = {name: f"Qwen/{name}-Instruct" for name in SIZES}  # hub ids
SHORT_NAMES |= {f"{name}-Thinking": f"Qwen/{name}-Thinking" for name in QWEN3}
SIZES |= {f"{name}-Thinking": config for name, config in QWEN3.items()}
