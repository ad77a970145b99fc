"""The model that is trained or evaluated: its folder found, its tokenizer and prompts checked, its weights loaded."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from mmsr import attention, lora
from mmsr import model as modeling
from mmsr.chat import OPENED, PROMPTS, UNTHOUGHT, Chat
from mmsr.config import Config, Options
from mmsr.pretrained.adapter import WEIGHTS, base_name, check_base, read_adapter
from mmsr.pretrained.chat_template import begins_thoughts
from mmsr.pretrained.config_json import read_config
from mmsr.pretrained.hub import resolve, resolve_adapter, without_weights
from mmsr.pretrained.load import load, skeleton, stored_weights
from mmsr.setup.checks import check_prompts, check_tokens
from mmsr.setup.questions import Questions
from mmsr.setup.sizes import check_memory, check_sizes, compute_dtype, sharding, warn_of_slow_products
from mmsr.shapes import adapter_ranks
from mmsr.system import parallel
from mmsr.system.determinism import deterministic
from mmsr.system.errors import UserError
from mmsr.system.files import file_digest
from mmsr.system.parallel import Ranks
from mmsr.tools import Tool
from mmsr.toy import base as toy_base
from mmsr.toy import world as toy


@dataclass
class Policy:
    """A model, and how it is talked to."""

    folder: Path  # the checkpoint that it is loaded from
    chat: Chat
    dtype: torch.dtype  # of the computation; sharded weights are kept in fp32
    model: modeling.VLModel  # sharded over the ranks


def open_policy(
    config: Options, tools: Sequence[Tool], questions: Questions, world: toy.World | None, ranks: Ranks
) -> Policy:
    """The model that --model names. Raises UserError where it, its prompts or its memory cannot be, as early as known.

    `questions`: their prompts have to fit.
    """
    dtype = compute_dtype(config, ranks)
    folder = ranks.main_process_first("model folder", partial(model_folder, config, world))
    with ranks.sync_errors():
        chat = open_chat(config, folder, tools)
        model_config = read_config(folder)
        check_tokens(folder, chat, model_config)
    for option, asked in questions.by_option.items():
        check_prompts(option, asked, chat, model_config.vision.processor, config, ranks)
    find_adapter(config, folder, ranks)
    if config.model:
        if not Path(config.model).is_dir():
            ranks.print(
                f"Finding the weights of {config.model} in the cache of the Hugging Face hub, or fetching them."
            )
        folder = ranks.main_process_first("model weights", partial(resolve, config.model))
    with ranks.sync_errors():
        sizes = skeleton(folder).config
        if ranks.main and not config.model:
            check_sizes(config, sizes, ranks)  # those of other models were known before: `preflight`
    if read_config(folder).tie_word_embeddings != sizes.tie_word_embeddings:
        ranks.print(f"{folder}: config.json ties the head to the embedding, but another head is stored: that is used.")
    if isinstance(config, Config):
        with ranks.sync_errors():
            kept_blocks = check_memory(config, sizes, ranks)
    ranks.print(f"Opening the model in {folder}.")
    model = open_model(config, folder, dtype, ranks)
    attention.sum_in_fp64(config.deterministic)
    deterministic(config.deterministic and ranks.device.type == "cpu")
    if isinstance(config, Config):
        model.checkpoint_blocks = config.recompute
        model.visual.checkpoint_blocks = config.recompute
        model.kept_blocks = kept_blocks
    return Policy(folder, chat, dtype, model)


def open_chat(config: Options, folder: Path, tools: Sequence[Tool]) -> Chat:
    """How turns are written and read: by the checkpoint's tokenizer and --prompts, --grammar and --thinking."""
    start = turn_start(config.thinking, folder)
    return Chat(folder, prompts_folder(config.prompts), list(tools), config.grammar, start)


def model_folder(config: Options, world: toy.World | None) -> Path:
    """The folder of the model that --model names, maybe without its weights; the toy base model's where it is empty."""
    if config.model:
        return without_weights(config.model)
    return toy_base.base_model(world, family=config.toy_model)


def find_adapter(config: Options, folder: Path, ranks: Ranks) -> None:
    """Fetch what --adapter names, where it is not here. Raises UserError for one that does not fit the model.

    `folder`: of the model, before its weights are fetched.
    """
    if not config.adapter:
        return
    adapter = ranks.main_process_first("adapter", partial(resolve_adapter, config.adapter))
    digests = ranks.all_gather(file_digest(adapter / WEIGHTS) if ranks.size > 1 else "")
    if len(set(digests)) > 1:  # on several machines each reads its own
        raise UserError(f"--adapter {config.adapter}: it is not the same on all machines; copy one of them to all")
    with ranks.sync_errors():
        adapter_ranks(read_config(folder), config.adapter)


def prompts_folder(name: str) -> Path:
    """The folder that --prompts names. Raises UserError where there is none."""
    folder = PROMPTS / name if name in ("toy", "real", "hermes") else Path(name)
    if not folder.is_dir():
        raise UserError(f"--prompts {name}: no such folder; give toy, real, hermes or a folder with user.txt in it")
    return folder


def turn_start(thinking: str, folder: Path) -> str:
    """The beginning of each turn of the model in `folder`, by --thinking and by its own chat template.

    "auto" is as the template has it. "off", for a model whose template begins thoughts, closes them at once.
    """
    begins = begins_thoughts(folder)
    if thinking == "on" or thinking == "auto" and begins:
        return OPENED
    return UNTHOUGHT if begins else ""


def open_model(config: Options, folder: Path, dtype: torch.dtype, ranks: Ranks) -> modeling.VLModel:
    """The model of a folder with its adapters; what is trained requires a gradient. Raises UserError. Collective."""
    with ranks.sync_errors():
        if ranks.main:
            warn_of_slow_products(dtype, ranks.device)
        model = skeleton(folder)
        adapters = open_adapters(config, folder, model, ranks)
        weights = [name for name, _ in model.named_parameters()]
        frozen = set(weights)
        if isinstance(config, Config) and not adapters:
            frozen = lora.frozen(weights, config.freeze)
    across = sharding(config, model.config, ranks)
    # Weights that are trained are kept in fp32 where they are sharded: there they are their own masters.
    stored = torch.float32 if ranks.size > 1 and across != "none" and not adapters else dtype
    model = load_model(folder, dtype, stored, ranks, across, frozen)
    for name, (a, b, scale) in adapters.items():
        lora.add_adapter(model.get_submodule(name), a.to(ranks.device), b.to(ranks.device), scale)
    return model


def open_reference(config: Config, folder: Path, dtype: torch.dtype, ranks: Ranks) -> modeling.VLModel:
    """A frozen copy of the model of a folder, sharded as the model is. Collective."""
    model = skeleton(folder)
    frozen = [name for name, _ in model.named_parameters()]
    return load_model(folder, dtype, dtype, ranks, sharding(config, model.config, ranks), frozen)


def open_adapters(
    config: Options, folder: Path, model: modeling.VLModel, ranks: Ranks
) -> dict[str, tuple[Tensor, Tensor, float]]:
    """A, B and α / r of each layer that gets an adapter: those of --adapter, or fresh ones for --lora.

    `model` may be on the meta device. Raises UserError.
    """
    layers = lora.linear_layers(model)
    if config.adapter:
        found = read_adapter(resolve_adapter(config.adapter), layers)
        if ranks.main:
            option = "--model" if config.model else "--model, or the --toy, --toy-model and --seed of its run"
            check_base(found, folder, base_name(config.model, folder), ranks.print, option)
            for note in found.notes(training=isinstance(config, Config)):
                ranks.print(note)
        return found.layers
    if not (isinstance(config, Config) and config.lora):
        return {}
    fresh = {}
    weights = [name for name, _ in model.named_parameters()]
    for name in lora.layers_to_adapt(weights, layers, config.lora_targets, config.freeze):
        a, b = lora.initial(layers[name], name, config.lora, config.seed)
        fresh[name] = (a, b, config.lora_alpha / config.lora)
    return fresh


def load_model(
    folder: Path,
    compute: torch.dtype,
    stored: torch.dtype,
    ranks: Ranks,
    across: str,
    frozen: Collection[str] = (),
) -> modeling.VLModel:
    """The model of a folder, its weights kept as `stored` and used as `compute`.

    Where there are ranks it is sharded `across` "node" or "all", or ("none") whole on each. `frozen`: names of weights
    that need no gradient.
    """
    if ranks.size == 1:
        return _freeze(load(folder, stored, ranks.device), frozen)
    with ranks.sync_errors():
        model = skeleton(folder)
    model = _freeze(model.to(stored), frozen)  # before it is sharded: FSDP looks once
    if across != "none":
        model = parallel.shard(model, ranks, compute, across)
    return parallel.load_on_ranks(model, stored_weights(folder, model), ranks)


def _freeze(model: modeling.VLModel, frozen: Collection[str]) -> modeling.VLModel:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    return model
