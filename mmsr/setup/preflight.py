"""What can be refused is refused at once: before anything is downloaded, opened or made.

In the order of what it costs: names, options and keys; memory and disk, from the sizes of the model; one request to the
hub for what its cache lacks; the small files of a model that is not known here. Data follow, then weights.
"""

from __future__ import annotations

import re
from pathlib import Path

from mmsr.config import FVQA_SEARCH, Config, EvalConfig, Options
from mmsr.data import fvqa
from mmsr.data.formats import read_examples
from mmsr.plan import known_sizes
from mmsr.pretrained import hub
from mmsr.pretrained.adapter import read_settings
from mmsr.pretrained.config_json import read_config
from mmsr.setup.judging import reward_judge_server
from mmsr.setup.policy import prompts_folder
from mmsr.setup.search import check_search
from mmsr.setup.sizes import check_memory, check_sizes
from mmsr.shapes import adapter_ranks
from mmsr.system.errors import UserError
from mmsr.system.files import missing
from mmsr.system.parallel import Ranks


def preflight(config: Options, ranks: Ranks) -> None:
    """Raises UserError for what names and sizes alone show to be wrong. Says what the run needs. Collective."""
    with ranks.sync_errors():
        if ranks.main:
            _check(config, ranks)


def _check(config: Options, ranks: Ranks) -> None:
    _check_names(config)
    model = known_sizes(config.model) if config.model else None
    if model and (not config.adapter or Path(config.adapter).is_dir()):
        if config.adapter:
            adapter_ranks(model, config.adapter)  # raises what does not fit
        if isinstance(config, Config):
            check_memory(config, model, ranks)
    download = hub.refuse_absent(wanted(config))
    if config.model:  # the toy base model is made, if need be, and then checked
        check_sizes(config, model or read_config(hub.without_weights(config.model)), ranks, download)


def _check_names(config: Options) -> None:
    """Raises UserError for a folder, file or back-end that is not there, and for a key that is missing."""
    prompts_folder(config.prompts)
    for name in _data(config):
        if name not in ("", "toy") and not fvqa.hub_file(name) and not Path(name).exists():
            read_examples(name, config.format)  # raises what is wrong with it
    if config.adapter and not hub.wanted_adapter(config.adapter):
        _check_adapter(config)
    check_search(config)
    if isinstance(config, EvalConfig):
        _check_server(config.judge, config.judge_model, judge=True)
    if isinstance(config, Config):
        _check_server(config.teacher, config.teacher_model)
        if config.reward_judge:
            reward_judge_server(config)
        for file in config.demonstrations:
            if not Path(file).exists():
                raise missing(Path(file))


def _check_adapter(config: Options) -> None:
    """Raises UserError for a folder that is no adapter's, and for an adapter of a hub's model beside the toy base."""
    base = read_settings(Path(config.adapter)).base
    if not config.model and re.fullmatch(hub.HUB_ID, base):
        raise UserError(f"--adapter {config.adapter} belongs to {base}, not to the toy base model: give --model {base}")


def _data(config: Options) -> list[str]:
    """What --data and --eval-data name."""
    return [*config.datasets, *([config.eval_data] if isinstance(config, Config) else [])]


def _check_server(address: str, model: str, judge: bool = False) -> None:
    """Raises UserError for a server's key or proxy that cannot be used. Nothing is asked."""
    if address:
        from mmsr.net.completions import OPENAI, judge_variable, open_server

        open_server(address, model, judge_variable() if judge else OPENAI)


def wanted(config: Options) -> list[hub.Wanted]:
    """What a run reads from the hub: the model, an adapter, the data, the searches recorded for FVQA."""
    found = []
    if config.model and (model := hub.wanted_model(config.model)):
        found.append(model)
    if config.adapter and (adapter := hub.wanted_adapter(config.adapter)):
        found.append(adapter)
    files = [place for name in _data(config) if (place := fvqa.hub_file(name))]
    if FVQA_SEARCH in config.back_ends.values():
        files.append((fvqa.FVQA, fvqa.RESULTS))
    by_repository: dict[str, list[str]] = {}
    for repository, file in dict.fromkeys(files):
        by_repository.setdefault(repository, []).append(file)
    return found + [fvqa.wanted(repository, *names) for repository, names in by_repository.items()]
