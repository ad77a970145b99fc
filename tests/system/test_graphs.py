"""Decode steps replayed as a CUDA graph would replay them: the kernels of one pass, on the memory of that pass.

There is no CUDA here, so what `Graphs` asks of torch.cuda is a model of it (`FakeCuda`): graphs are tapes of operators,
and pools of memory are counted as torch's allocator counts them.
"""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from helpers import each_family
from test_engine import groups, model, run, texts  # noqa: F401 - a fixture
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmsr.system.graphs import WARM_UPS, Graphs

WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero")


class Tape(TorchDispatchMode):
    """Records operators with the very tensors that they got. As in a capture, nothing has happened afterwards."""

    def __init__(self):
        super().__init__()
        self.calls, self.before = [], {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        assert func._schema.name.split("::")[1] not in WAITS, f"{func} waits for the device"
        if func._schema.name == "aten::index":
            assert all(i is None or i.dtype == torch.long for i in args[1]), "how many are true, the host has to know"
        for argument, value in zip(func._schema.arguments, args):
            if argument.alias_info and argument.alias_info.is_write and id(value) not in self.before:
                self.before[id(value)] = value, value.clone()
        result = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, result))
        return result

    def __exit__(self, *error):
        super().__exit__(*error)
        for tensor, before in reversed(self.before.values()):
            tensor.copy_(before)

    def replay(self):
        for func, args, kwargs, result in self.calls:
            old = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)}
            for place, new in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs))):
                if torch.is_tensor(new) and place.untyped_storage().data_ptr() not in old:
                    place.copy_(new)


class FakeCuda:
    """Streams, graphs and pools, as far as `Graphs` uses them.

    A pool is counted as CUDACachingAllocator does it (`beginAllocateToPool`, `releasePool`): each capture adds a use, a
    graph that ends takes its own away, and a capture into a pool that is known but has no use left is an error.
    """

    def __init__(self, patch: pytest.MonkeyPatch):
        self.uses: dict = {}  # of each pool
        self.current = ["default"]
        self.captures = self.replays = 0
        cuda = self

        class Graph:
            def capture_begin(self, pool, capture_error_mode):
                assert cuda.current[-1] != "default" and capture_error_mode == "thread_local"
                if cuda.uses.get(pool) == 0:
                    raise RuntimeError("use_count > 0 INTERNAL ASSERT FAILED: the pool has no graph any more")
                cuda.uses[pool] = cuda.uses.get(pool, 0) + 1
                cuda.captures += 1
                self.pool, self.tape = pool, Tape()
                self.tape.__enter__()

            def capture_end(self):
                self.tape.__exit__(None, None, None)

            def replay(self):
                cuda.replays += 1
                self.tape.replay()

            def __del__(self):
                if hasattr(self, "pool"):
                    cuda.uses[self.pool] -= 1

        for name, fake in {
            "CUDAGraph": Graph,
            "Stream": lambda: SimpleNamespace(wait_stream=lambda other: None, device_index=0),
            "current_stream": lambda: self.current[-1],
            "graph_pool_handle": lambda: object(),
            "stream": self.stream,
        }.items():
            patch.setattr(torch.cuda, name, fake)
        init = Graphs.__init__
        patch.setattr(Graphs, "__init__", lambda graphs, on: init(graphs, True))

    @contextmanager
    def stream(self, chosen):
        self.current.append(chosen)
        try:
            yield
        finally:
            self.current.pop()


@pytest.fixture
def cuda(monkeypatch):
    """Engines capture their decode steps, on tape."""
    return FakeCuda(monkeypatch)


@each_family
@pytest.mark.first_is_quick
@pytest.mark.parametrize("sequences, slots", [(4, 12), (3, 4)])
def test_replayed_steps_draw_other_tokens(model, cuda, sequences, slots, monkeypatch):  # noqa: F811
    """Slots that come and go, sequences at a tool, and rows that move to the front."""
    options = dict(slots=slots, turn_tokens=40, max_tokens=400)
    replayed, plain = groups(3, sequences), groups(3, sequences)
    run(model, replayed, **options)
    monkeypatch.undo()
    assert cuda.captures > 1 and cuda.replays > 2 * cuda.captures, "nothing was replayed, so nothing is shown"
    run(model, plain, **options)
    assert texts(replayed) == texts(plain)
    for group, other in zip(replayed, plain):
        for sequence, twin in zip(group.sequences, other.sequences):
            assert torch.allclose(torch.tensor(sequence.logps), torch.tensor(twin.logps), atol=1e-5)


@each_family
@pytest.mark.slow
def test_a_graph_of_short_slots_outlives_them(model, cuda, monkeypatch):  # noqa: F811
    """Parked sequences get other slots, and the old graphs, which know the old ones, are gone with their memory."""
    options = dict(slots=6, turn_tokens=40, max_tokens=400)
    short, plain = groups(2, 4), groups(2, 4)
    engine = run(model, short, slot_tokens=45, **options)
    pools = list(cuda.uses)
    assert len(pools) == 2 and cuda.uses[pools[0]] == 0, "graphs of the first slots are left"
    assert cuda.uses[pools[1]] == len(engine.graphs.captured) > 0
    assert engine.counts["parked"] and engine.graphs.replayed > engine.graphs.seen.total(), "nothing is shown"
    monkeypatch.undo()
    run(model, plain, **options)
    assert texts(short) == texts(plain)


def test_a_shape_is_captured_before_it_has_come_back(cuda):
    graphs, total = Graphs(True), torch.zeros(())
    for _ in range(WARM_UPS + 3):
        graphs("shape", lambda: total.add_(1))
    assert cuda.captures == 1 and total == WARM_UPS + 3, "a capture is no pass, and a replay is one"
    assert graphs.replayed == cuda.replays == 3


def test_lengths_that_steps_have_in_common_are_many():
    graphs, off = Graphs(True), Graphs(False)
    assert [graphs.bucket(n, 100) for n in (1, 8, 9, 64, 65, 100)] == [8, 8, 16, 64, 100, 100]
    assert [graphs.bucket(n, 5000, least=64) for n in (1, 64, 65, 4097)] == [64, 64, 128, 5000]
    assert off.bucket(9, 100) == 9


def test_graphs_of_one_engine_go_into_the_pool_of_another(cuda, model):  # noqa: F811
    """An engine lives for one rollout. Its graphs go with it, and their pool may not be used again."""
    for _ in range(3):
        engine = run(model, groups(2, 2), turn_tokens=30, max_tokens=400)
        assert engine.graphs.on, "a capture failed"
        del engine
    assert len(cuda.uses) == 3 and set(cuda.uses.values()) == {0}


def test_a_pass_that_cannot_be_captured_ends_the_run(monkeypatch):
    def fail(self, work):
        raise RuntimeError("operation not permitted when stream is capturing\nCUDA kernel errors …")

    monkeypatch.setattr(Graphs, "_capture", fail)
    graphs, total = Graphs(True), torch.zeros(())
    for _ in range(WARM_UPS):
        graphs(1, lambda: total.add_(1))
    with pytest.warns(RuntimeWarning, match=r"not captured \(operation not permitted when stream is capturing\)"):
        graphs(1, lambda: total.add_(1))
    graphs(1, lambda: total.add_(1))
    assert total == WARM_UPS + 2 and not graphs.on and graphs.bucket(7, 500) == 7


def test_a_spoilt_capture_stays_under_way(monkeypatch):
    """What torch.cuda.graph leaves then: its stream as the current one, and an allocator that still records."""
    current, recording = ["default"], []

    class Graph:
        def capture_begin(self, pool, capture_error_mode):
            assert current[-1] is graphs.stream
            recording.append(pool)

        def capture_end(self):
            raise RuntimeError("operation failed due to a previous error during capture")

    @contextmanager
    def stream(chosen):
        current.append(chosen)
        try:
            yield
        finally:
            current.pop()

    def end(device, pool):
        assert device == 1
        recording.remove(pool)

    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
    for name, fake in {
        "CUDAGraph": Graph,
        "Stream": lambda: SimpleNamespace(wait_stream=lambda other: None, device_index=1),
        "current_stream": lambda: current[-1],
        "graph_pool_handle": lambda: (0, 1),
        "stream": stream,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    graphs, total = Graphs(True), torch.zeros(())
    with pytest.warns(RuntimeWarning, match="not captured .operation failed"):
        for _ in range(WARM_UPS + 1):
            graphs(1, lambda: total.add_(1))
    assert current == ["default"] and not recording and not graphs.on
