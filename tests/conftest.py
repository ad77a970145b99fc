"""A toy world, and a base model that is made once, in seconds: it speaks the markup and knows nothing."""

import pytest
import torch

from mmsr import attention, toy, toy_base

torch.set_num_threads(1)  # see helpers.py

MINIATURE = toy_base.WarmStart(steps=35, batch=16, lr=3e-3, warmup=10, copying=0.0, names=0.0, towns=0.0)


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


@pytest.fixture(autouse=True)
def _no_cache_but_our_own(request, monkeypatch, tmp_path):
    """No fast test may find or leave anything in the user's cache."""
    if request.node.get_closest_marker("slow") is None:
        monkeypatch.setenv("MMSR_CACHE", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def _no_run_widens_the_sums_of_the_next_test():
    yield
    attention.sum_widely(False)
