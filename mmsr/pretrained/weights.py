"""The weight files of a Hugging Face folder, checked by their headers before a weight is read.

A quantised checkpoint has the usual names, but they hold whole numbers or 8-bit floats, with the scales in separate
tensors. Cast to the model's type it loads without an error and computes noise. So every name and every type of number
is checked, and what this program does not understand is refused.
"""

from __future__ import annotations

import json
import re
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Iterator, Mapping, Sequence

from safetensors import SafetensorError, safe_open
from torch import Tensor

from mmsr.system.errors import UserError, first_line

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors calls them
FULL = "give the full-precision checkpoint that it was made from"
# Names of the tensors that quantisers add: bitsandbytes, GPTQ, AWQ, compressed-tensors, FP8, torchao, HQQ, AQLM and
# quanto.
QUANTISED = re.compile(
    "scale|zero|absmax|quant|packed|qweight|qdata|codebook|[.](SCB|g_idx|codes|W_q)$|_data$|_(blocks|codes)$"
)
PICKLED = ("pytorch_model*", "*.pth", "*.pt", "*.ckpt", "*.distcp")
LFS = b"version https://git-lfs"  # what git leaves in place of a large file
QUANTISERS_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
# Names of what PEFT (LoRA and DoRA, IA3, LoHa, LoKr, VeRA, OFT) adds, and of the weights that it wraps.
ADAPTERS = re.compile(
    r"^base_model\.|\b(lora|ia3|hada|lokr|vera|b?oft)_|\b(base_layer|modules_to_save|original_module)\b"
)
BUFFERS = re.compile(r"\binv_freq$")  # rotary frequencies, which old versions of transformers stored; computed here

Shapes = Mapping[str, tuple[int, ...]]  # of a model's parameters, by name


@dataclass(frozen=True)
class Header:
    """One stored weight, as its file's header describes it."""

    file: Path
    name: str  # in that file
    dtype: str
    shape: tuple[int, ...]


# ---- headers against the model


def headers(folder: Path) -> dict[str, Header]:
    """What the files of a folder hold, by our names of the weights. No weight is read.

    Raises UserError for a folder without weights, damaged files, quantised weights and adapters.
    """
    found: dict[str, Header] = {}
    for file in weight_files(folder):
        for header in headers_of(file):
            name = our_name(header.name)
            if name in found:
                raise UserError(f"{file}: {listed([name])} is in {found[name].file.name} too: fetch them again")
            found[name] = header
    _refuse_quantised(found)
    return found


def fitting(folder: Path, found: Mapping[str, Header], shapes: Shapes) -> dict[str, Header]:
    """The headers of the weights that a model needs, by the model's names, in the order of the files.

    A tied embedding may be stored as the head. Raises UserError for a weight that is missing or misshapen.
    """
    tied = EMBEDDING in shapes and HEAD not in shapes
    if tied and EMBEDDING not in found and HEAD in found:
        found = {EMBEDDING if name == HEAD else name: header for name, header in found.items()}
    for name, header in found.items():
        if name in shapes and header.shape != shapes[name]:
            _refuse_shape(name, header, shapes[name])
    missing = [name for name in shapes if name not in found]
    if missing:
        some = f"{len(missing)} of {len(shapes)} weights are missing ({listed(missing)})"
        others = [name for name in found if name not in shapes and name != HEAD]
        if others:  # a wrapper's names, or another program's
            some += f", and there is no place for others ({listed(others)})"
        raise UserError(f"{folder}: {some}: fetch it again, or take config.json and weights of one checkpoint")
    return {name: header for name, header in found.items() if name in shapes}


def _refuse_shape(name: str, header: Header, wanted: tuple[int, ...]) -> None:
    if header.shape == (0,):  # what DeepSpeed leaves of a weight that is sharded over processes
        raise UserError(f"{header.file}: {name} is empty: save it again with the weights gathered (ZeRO-3)")
    what = f"{name} has shape {header.shape}, config.json says {wanted}"
    raise UserError(f"{header.file}: {what}: not of the same model")


def refuse_others(folder: Path, found: Mapping[str, Header], shapes: Shapes) -> None:
    """UserError for weights that the model of config.json does not have. `own_head` has checked a tied head before."""
    others = [name for name in found if name not in shapes and name != HEAD and not BUFFERS.search(name)]
    if others:
        some = f"{len(others)} weights have no place in the model of config.json ({listed(others)})"
        raise UserError(f"{folder}: {some}: take config.json and weights of one checkpoint")


def own_head(found: Mapping[str, Header]) -> bool:
    """Whether a head is stored that differs from the embedding. transformers then does not tie them either."""
    if HEAD not in found or EMBEDDING not in found:
        return False
    if found[HEAD].shape != found[EMBEDDING].shape:
        return True
    head = _tensor(found[HEAD])
    embedding = _tensor(found[EMBEDDING])
    return not bool((head == embedding).all())


def _refuse_quantised(found: Mapping[str, Header]) -> None:
    for name, header in found.items():
        if ADAPTERS.search(name):
            advice = "save it with PEFT's save_pretrained and give it as --adapter DIR, with its base as --model"
            raise UserError(f"{header.file}: {listed([name])} is an adapter's: {advice}")
        if header.dtype not in FLOATS or QUANTISED.search(name):
            what = f"{listed([name])} holds {header.dtype}"
            raise UserError(f"{header.file}: the weights are quantised ({what}): {FULL}")


# ---- weights


def tensors(found: Mapping[str, Header]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) one at a time: views of the files.

    Raises UserError for NaN, infinite numbers, and zeros where a trained model has none.
    """
    for file, group in groupby(found.items(), lambda item: item[1].file):
        with opened(file) as stored:
            for name, header in group:
                tensor = stored.get_tensor(header.name)
                _check_values(file, name, tensor)
                yield name, tensor


def _check_values(file: Path, name: str, tensor: Tensor) -> None:
    low, high = tensor.aminmax()  # one pass without a copy; NaN comes through
    low = low.float()
    high = high.float()
    if not (low.isfinite() and high.isfinite()):
        raise UserError(f"{file}: {name} holds NaN or infinite numbers: take an earlier checkpoint")
    # Biases may be zero, and so may a matrix that was switched off on purpose. Norms and embeddings never are.
    norm = tensor.ndim == 1 and name.endswith(".weight")
    if low == high == 0 and (norm or name in (EMBEDDING, HEAD)):
        raise UserError(f"{file}: {name} holds zeros only: not written or not fetched whole, fetch it again")


def _tensor(header: Header) -> Tensor:
    with opened(header.file) as stored:
        return stored.get_tensor(header.name)


# ---- files


def weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the shards that the index names."""
    single = folder / "model.safetensors"
    index = folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        _explain_absence(folder)
        raise UserError(f"model folder {folder} has neither {single.name} nor {index.name}: fetch its weights")
    names = read_object(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(_is_plain(name) for name in names.values()):
        raise UserError(f"{index}: weight_map does not name a file of this folder for each weight: fetch it again")
    shards = sorted({folder / name for name in names.values()})
    absent = [shard.name for shard in shards if not shard.is_file()]
    if absent:
        raise UserError(f"{index} names {len(shards)} files, {len(absent)} do not exist ({absent[0]}): fetch it again")
    return shards


def _is_plain(name: Any) -> bool:
    """Whether it names a file directly in the folder."""
    return isinstance(name, str) and bool(re.fullmatch(r"[\w.-]{1,200}\.safetensors", name, re.ASCII))


def _explain_absence(folder: Path) -> None:
    """UserError if a folder without safetensors holds weights of another form."""
    if any(folder.glob("*.gguf")):
        what = "a GGUF file, which is quantised or made for another program"
        raise UserError(f"model folder {folder} holds {what}: {FULL}")
    for pattern in PICKLED:
        if any(folder.glob(pattern)):
            advice = "save it again with transformers, which writes safetensors"
            raise UserError(f"model folder {folder} holds pickled weights, which are not opened here: {advice}")


def headers_of(file: Path) -> list[Header]:
    """What one file holds. UserError for a damaged file."""
    found = []
    with opened(file) as stored:
        for name in stored.keys():
            part = stored.get_slice(name)
            found.append(Header(file, name, part.get_dtype(), tuple(part.get_shape())))
    return found


NESTED = {"model.visual.": "visual.", "model.language_model.": "model."}  # beginnings of names -> ours


def our_name(name: str) -> str:
    """A weight's name in our models.

    Files of Qwen3-VL say `model.visual.*` and `model.language_model.*`, as transformers 5 does in memory, for
    Qwen2.5-VL too; most files of that have our names.
    """
    for nested, ours in NESTED.items():
        if name.startswith(nested):
            return ours + name.removeprefix(nested)
    return name


def nested_name(name: str) -> str:
    """The inverse: `model.visual.*` or `model.language_model.*` for one of our names."""
    for nested, ours in NESTED.items():
        if name.startswith(ours):
            return nested + name.removeprefix(ours)
    return name


def listed(names: Sequence[str]) -> str:
    """The first three, in one line even if a name of a downloaded file holds line breaks."""
    shown = [" ".join(name.split())[:120] for name in names[:3]]
    if len(names) > 3:
        shown.append("...")
    return ", ".join(shown)


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """safe_open. UserError for a damaged file, whether that shows at once or while it is read."""
    try:
        with safe_open(file, framework="pt") as stored:
            yield stored
    except (SafetensorError, OSError) as error:
        reason = first_line(error)
        if _begins_with(file, LFS):
            raise UserError(f"{file} is not the file but Git LFS's note of it: run `git lfs pull` there") from error
        raise UserError(f"{file} cannot be read ({reason}): truncated or corrupt, fetch it again") from error


def _begins_with(file: Path, head: bytes) -> bool:
    try:
        with open(file, "rb") as opened:
            return opened.read(len(head)) == head
    except OSError:
        return False


def read_object(file: Path) -> dict[str, Any]:
    """The object that a JSON file holds. UserError for a file that is damaged or holds something else."""
    try:
        values = json.loads(file.read_bytes())
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): give a readable file") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not valid JSON ({first_line(error)}): fetch it again") from error
    if not isinstance(values, dict):
        raise UserError(f"{file} holds a JSON {type(values).__name__}, not an object: fetch it again")
    return values


# ---- adapters and quantised checkpoints, told by other files than the weights


def refuse_adapter(folder: Path) -> None:
    """UserError for the folder of an adapter such as LoRA: it holds a difference to a model, not the model."""
    config = folder / "adapter_config.json"
    if not config.is_file() and not any(folder.glob("adapter_model.*")):
        return
    base = read_object(config).get("base_model_name_or_path") if config.is_file() else None
    named = listed([str(base or "another model")])
    advice = "give it as --adapter DIR, with its base as --model"
    raise UserError(f"model folder {folder} holds an adapter of {named}, not a model: {advice}")


def refuse_quantised_config(folder: Path, config: Mapping[str, Any]) -> None:
    """UserError if the folder's config.json, or a file beside it, says that the weights are quantised."""
    for part in (config, config.get("text_config"), config.get("vision_config")):
        if not isinstance(part, dict):
            continue
        found = part.get("quantization_config") or part.get("compression_config")
        if found:
            method = found.get("quant_method") if isinstance(found, dict) else None
            said = listed([method if isinstance(method, str) else "quantization_config"])
            raise UserError(f"{folder / 'config.json'}: the weights are quantised ({said}): {FULL}")
    for name in QUANTISERS_FILES:
        if (folder / name).is_file():
            raise UserError(f"{folder / name}: the weights are quantised: {FULL}")
