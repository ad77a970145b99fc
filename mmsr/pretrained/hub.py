"""Models and files from the Hugging Face hub, or from its cache.

The hub's own client tries a hub that does not answer six times, which takes half a minute for each file. So one request
asks first whether the hub answers; where it does not, only its cache is read. `refuse_absent` says in one line all that
a run lacks then. Its own settings apply: HF_HOME, HF_HUB_OFFLINE, HF_TOKEN, HF_ENDPOINT.
"""

from __future__ import annotations

import os
import queue
import re
import shlex
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path
from typing import Any

from mmsr.pretrained.published import SHORT_NAMES
from mmsr.pretrained.weights import weight_files
from mmsr.system.errors import UserError, first_line
from mmsr.system.progress import MinuteLines, on_terminal

SMALL = ("*.json", "*.txt", "*.jinja")  # of a model: all but its weights
WEIGHTS = "*.safetensors"
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
HUB_ID = r"\w[\w.-]*/\w[\w.-]*"
OFFLINE = "HF_HUB_OFFLINE is set"
SECONDS = 3.0  # that the hub has to answer, unless HF_HUB_ETAG_TIMEOUT is set


@dataclass(frozen=True)
class Wanted:
    """Files of one repository of the hub."""

    repository: str
    files: tuple[str, ...]  # names or patterns
    kind: str  # "model" or "dataset"
    instead: str  # what may be given in its place, such as "--data FILE.parquet"

    def __str__(self) -> str:
        return self.repository if self.kind == "model" else f"{' '.join(self.files)} of {self.repository}"

    @property
    def command(self) -> str:
        """The line that downloads it."""
        if self.kind == "model":
            return shlex.join(["hf", "download", self.repository])
        return shlex.join(["hf", "download", "--repo-type", "dataset", self.repository, *self.files])


# ---- models


def repository(name: str) -> str:
    """The hub id that `--model NAME` means; empty for a folder. UserError for a name that can be neither."""
    if Path(name).is_dir():
        return ""
    if name not in SHORT_NAMES and not re.fullmatch(HUB_ID, name):
        known = ", ".join(SHORT_NAMES)
        adapter = Path(name).with_name("adapter")
        if adapter.is_dir():
            raise UserError(f"--model {name}: there is no such folder; the run wrote {adapter}: give it as --adapter")
        raise UserError(f"--model {name}: there is no such folder; give one, a hub id (OWNER/NAME) or {known}")
    return SHORT_NAMES.get(name, name)


def wanted_model(name: str) -> Wanted | None:
    """What `--model NAME` needs of the hub; None for a folder."""
    found = repository(name)
    return Wanted(found, (*SMALL, WEIGHTS), "model", "--model FOLDER") if found else None


def resolve(name: str) -> Path:
    """The folder that `--model NAME` means: a folder, a short name such as Qwen2.5-VL-7B, or a hub id.

    The latter two are downloaded unless they are in the hub's cache. Raises UserError if they cannot be.
    """
    return _model_folder(name, [*SMALL, WEIGHTS])


def without_weights(name: str) -> Path:
    """As `resolve`, but only the small files are downloaded: config.json, the tokenizer's, the list of the weights."""
    return _model_folder(name, list(SMALL))


def _model_folder(name: str, patterns: list[str]) -> Path:
    found = repository(name)
    if not found:
        return Path(name)
    what = f"--model {name}: no such folder is here, and {found!r}"
    return fetched("snapshot_download", what, "or give a folder", repo_id=found, allow_patterns=patterns)


def wanted_adapter(name: str) -> Wanted | None:
    """What `--adapter NAME` needs of the hub; None for a folder."""
    return None if Path(name).is_dir() else Wanted(_adapter_id(name), ADAPTER, "model", "--adapter FOLDER")


def resolve_adapter(name: str) -> Path:
    """The folder that `--adapter NAME` means: a folder, or a hub id, whose adapter is downloaded unless it is cached.

    Raises UserError where it cannot be.
    """
    if Path(name).is_dir():
        return Path(name)
    what = f"--adapter {name}: no such folder is here, and {name!r}"
    return fetched("snapshot_download", what, "or give a folder", repo_id=_adapter_id(name), allow_patterns=ADAPTER)


def _adapter_id(name: str) -> str:
    if not re.fullmatch(HUB_ID, name):
        if Path(name).is_file():
            raise UserError(f"--adapter {name} is a file; give the folder that it is in")
        raise UserError(f"--adapter {name}: there is no such folder; give one, or a hub id (OWNER/NAME)")
    return name


# ---- the hub


def fetched(function: str, what: str, advice: str, **where: Any) -> Path:
    """The path that a download function of huggingface_hub, given by name, returns for the arguments `where`.

    Raises UserError "what … advice".
    """
    import huggingface_hub  # slow to import, and not needed for local files

    if out_of_reach():
        where["local_files_only"] = True
    if not on_terminal():
        where["tqdm_class"] = MinuteLines  # instead of its own bars
    try:
        return Path(getattr(huggingface_hub, function)(**where))
    except Exception as error:  # of the hub's client, its HTTP library or the file system
        reason = out_of_reach() or reason_of(error)
        raise UserError(f"{what} could not be fetched from the Hugging Face hub ({reason}); {advice}") from error


def out_of_reach() -> str:
    """Why the hub cannot be asked; empty where it answers. The hub is asked once, for SECONDS at most."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return OFFLINE
    seconds = constants.HF_HUB_ETAG_TIMEOUT if "HF_HUB_ETAG_TIMEOUT" in os.environ else SECONDS
    return _no_answer(constants.ENDPOINT, seconds)


@lru_cache
def _no_answer(address: str, seconds: float) -> str:
    """What an address answers a request with, where that is no answer of a hub. A look-up of names has no time limit of
    its own, so the request has a thread that nothing waits for."""
    answers: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=lambda: answers.put(_asked(address, seconds)), daemon=True).start()
    try:
        return answers.get(timeout=seconds)
    except queue.Empty:
        return f"{address} does not answer within {seconds:g} seconds, HF_HUB_ETAG_TIMEOUT=30 would wait longer"


def _asked(address: str, seconds: float) -> str:
    from huggingface_hub.utils import get_session

    try:
        status = get_session().head(address, timeout=2 * seconds).status_code
    except Exception as error:  # of the HTTP library
        return f"{address}: {first_line(error)}"
    return f"{address} answers {status}" if status in (502, 503, 504) else ""


def reason_of(error: Exception) -> str:
    """Why a download failed, in words that help."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return "ask for access on its page there, then export HF_TOKEN"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "it is not there, or only for some: then export HF_TOKEN"
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return "it has no such file"
    return first_line(error.__cause__ or error)  # the client wraps some errors in a guess about the network


# ---- before anything is downloaded


def refuse_absent(wanted: Sequence[Wanted]) -> int:
    """The bytes that have to be downloaded, as far as the hub tells them. Raises UserError, in one line for all of
    `wanted`, where the hub cannot be reached and its cache lacks some, and for a repository or file that is not there.
    """
    if not wanted:
        return 0
    absent = [files for files in wanted if not cached(files)]
    reason = out_of_reach()
    if not reason:
        return sum(map(_bytes_to_fetch, absent))
    if absent:
        raise UserError(_what_to_do(absent, reason))
    if reason != OFFLINE:
        print(f"The Hugging Face hub cannot be reached ({reason}): what its cache holds is used.", file=sys.stderr)
    return 0


def _what_to_do(absent: Sequence[Wanted], reason: str) -> str:
    """The line about a hub that cannot be reached, for `reason`, and a cache that lacks `absent`."""
    offline = reason == OFFLINE
    commands = " && ".join(files.command for files in absent)
    advice = f"on a machine with a network type `{commands}` and copy its cache here, HF_HOME is where"
    advice = f"unset HF_HUB_OFFLINE, or {advice}" if offline else f"{advice}, and export HF_HUB_OFFLINE=1"
    instead = ", ".join(dict.fromkeys(files.instead for files in absent))
    lacking = " and ".join(map(str, absent))
    return (
        f"the Hugging Face hub cannot be reached ({reason}), and its cache {hub_cache()} lacks {lacking}: {advice}; "
        f"or give {instead}{'' if offline else '; or export HF_ENDPOINT, the address of a mirror'}"
    )


def hub_cache() -> Path:
    """The folder of the hub's cache."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def cached(wanted: Wanted) -> bool:
    """Whether all that is wanted is in the hub's cache. What an interrupted download left is not."""
    find = _finder(wanted)
    if WEIGHTS not in wanted.files:  # files by their names
        return all(find(file) for file in wanted.files)
    config = find("config.json")
    try:
        return bool(config) and bool(weight_files(Path(config).parent))
    except UserError:
        return False


def _finder(wanted: Wanted) -> Callable[[str], str]:
    """The function that gives a file's path in the cache, or an empty string."""
    from huggingface_hub import try_to_load_from_cache

    def find(file: str) -> str:
        path = try_to_load_from_cache(wanted.repository, file, repo_type=wanted.kind)
        return path if isinstance(path, str) else ""

    return find


def _bytes_to_fetch(wanted: Wanted) -> int:
    """Bytes of the files that the cache lacks; 0 where the hub does not tell, as some mirrors do not.

    Raises UserError for a repository that is not there, and for a file that it does not have.
    """
    from huggingface_hub import HfApi, constants, errors

    api = HfApi()
    info = api.model_info if wanted.kind == "model" else api.dataset_info
    try:
        files = info(wanted.repository, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT).siblings or []
    except errors.RepositoryNotFoundError as error:
        complaint = f"the Hugging Face hub has no {wanted.kind} {wanted.repository!r} ({reason_of(error)})"
        raise UserError(f"{complaint}; check the name, or give {wanted.instead}") from None
    except Exception:  # the download itself will tell what is wrong
        return 0
    names = [file.rfilename for file in files]
    if WEIGHTS not in wanted.files and names:
        for file in set(wanted.files) - set(names):
            some = ", ".join(names[:5])
            raise UserError(f"{wanted.repository} on the Hugging Face hub has no {file}, but {some}; name one of them")
    find = _finder(wanted)
    total = 0
    for file in files:
        if any(fnmatch(file.rfilename, pattern) for pattern in wanted.files) and not find(file.rfilename):
            total += file.size or 0
    return max(0, total - _begun(wanted))


def _begun(wanted: Wanted) -> int:
    """Bytes that an interrupted download has left in the cache, and from which the next one continues."""
    folder = hub_cache() / f"{wanted.kind}s--{wanted.repository.replace('/', '--')}"
    return sum(file.stat().st_size for file in folder.glob("blobs/*.incomplete"))
