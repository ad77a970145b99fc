"""A toy world, and a base model that is made once, in seconds: it speaks the markup and knows nothing."""

import os
from pathlib import Path

import helpers
import pytest
import torch

from mmsr import attention
from mmsr import model as modeling
from mmsr.chat import PROMPTS, Chat
from mmsr.net.http import AUTHORITIES
from mmsr.pretrained.save import save
from mmsr.reward import LEGAL_SHAPES
from mmsr.system.determinism import deterministic
from mmsr.tools import search_tools
from mmsr.toy import base as toy_base
from mmsr.toy import world as toy
from mmsr.update import MasterWeights, Trainer

torch.set_num_threads(1)  # see helpers.py
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the programs that tests start: beside others two threads only wait

for name in [name for name in os.environ if name.upper().endswith("_PROXY") or name in AUTHORITIES]:
    del os.environ[name]  # this machine's network is none of the tests'

MINIATURE = toy_base.WarmStart(steps=35, batch=16, lr=3e-3, warmup=10, copying=0.0, names=0.0, towns=0.0)


@pytest.fixture(params=helpers.FAMILIES)
def each_family(request):
    """A test that uses this runs once with each family of models: tiny models and pictures are of that one."""
    with pytest.MonkeyPatch.context() as patch:  # of its own: a test may undo its patches half-way
        patch.setattr(helpers, "FAMILY", request.param)
        yield


@pytest.fixture(scope="session")
def world():
    return toy.World(0)


@pytest.fixture(scope="session")
def miniature_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache") / "not" / "there"


@pytest.fixture(scope="session")
def miniature(world, miniature_cache):
    """Folder of a base model that got the miniature warm start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MMSR_CACHE", str(miniature_cache))
        return toy_base.base_model(world, MINIATURE)


@pytest.fixture(scope="session")
def miniature_qwen3(world, miniature_cache):
    """The same in the architecture of Qwen3-VL."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MMSR_CACHE", str(miniature_cache))
        return toy_base.base_model(world, MINIATURE, "qwen3")


@pytest.fixture(scope="session")
def basic_base() -> Path:
    """Folder of the basic world's base model. It takes minutes to make, and is kept in the user's cache."""
    return toy_base.base_model(toy.World(0))


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A model of the toy world that has barely learnt the format, so that its rewards differ."""
    folder, world = tmp_path_factory.mktemp("newborn"), toy.World(0)
    tokenizer = toy_base.build_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    chat = Chat(folder, PROMPTS / "toy", search_tools(world.web, 1, 0))
    model = modeling.random_model(toy_base.model_config(tokenizer), 0)
    optimizer = MasterWeights(model, betas=(0.9, 0.98), fused=False)
    trainer = Trainer(model, optimizer, chat.suppressed_tokens(model.config.vocab_size), loss_norm="token", sft=True)
    traces = toy_base.Traces(world, chat, 0)
    for step in range(25):
        trainer.step([traces.batch(16)], 3e-3 * min(1, (step + 1) / 10))
    save(model, folder)
    return folder


@pytest.fixture(autouse=True)
def _no_cache_but_our_own(request, monkeypatch, tmp_path):
    """No fast test, and no case of one that is slow, may find or leave anything in the user's cache."""
    if request.node.get_closest_marker("slow") is None or request.node.get_closest_marker("first_is_quick"):
        monkeypatch.setenv("MMSR_CACHE", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def _nothing_switched_on_in_one_test_stays_on_in_the_next():
    shapes = set(LEGAL_SHAPES)
    yield
    attention.sum_in_fp64(False)
    deterministic(False)
    LEGAL_SHAPES.intersection_update(shapes)


@pytest.hookimpl(tryfirst=True)  # before tests are left out by their marks
def pytest_collection_modifyitems(items):
    """All cases but the first of a test that is marked `first_is_quick` are slow.

    Long tests come first, so that of several processes none ends with one while the others have nothing left to do.
    Those that want the base model stand together, where one process runs them: two would make it twice.
    """
    begun = set()
    for item in items:
        test = item.nodeid.split("[")[0]
        if item.get_closest_marker("first_is_quick") and test in begun:
            item.add_marker("slow")
        begun.add(test)
    items.sort(key=lambda item: ("basic_base" not in item.fixturenames, item.get_closest_marker("slow") is None))
