"""Decode steps replayed as a CUDA graph would replay them: the kernels of one pass, on the memory of that pass."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from test_engine import groups, model, run, texts  # noqa: F401 - a fixture
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmsr.graphs import STRIDE, USUAL, Graphs

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


@pytest.fixture
def taped(monkeypatch):
    """Engines capture, on tape. A list of the graphs that they made."""
    made = []

    def capture(self, work):
        with Tape() as tape:
            result = work()
        made.append(tape)
        return tape, result

    init = Graphs.__init__
    monkeypatch.setattr(Graphs, "__init__", lambda self, on: init(self, True))
    monkeypatch.setattr(Graphs, "_capture", capture)
    return made


@pytest.mark.parametrize("members, slots", [(4, 12), (3, 4)])
def test_replayed_steps_draw_other_tokens(model, taped, members, slots, monkeypatch):  # noqa: F811
    """Slots that come and go, waiting members, rows that move to the front, and a cache that grows meanwhile."""
    replays = []
    monkeypatch.setattr(Tape, "replay", lambda tape, plain=Tape.replay: (replays.append(tape), plain(tape)))
    options = dict(slots=slots, turn_tokens=40, max_tokens=400)
    replayed, plain = groups(3, members), groups(3, members)
    run(model, replayed, **options)
    monkeypatch.undo()
    assert len(taped) > 1 and len(replays) > 2 * len(taped), "nothing was replayed, so nothing is shown"
    run(model, plain, **options)
    assert texts(replayed) == texts(plain)
    logps = [[torch.tensor(m.logps) for g in batch for m in g.members] for batch in (replayed, plain)]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*logps))


def test_a_shape_is_captured_before_it_has_come_back_often(taped):
    graphs, total = Graphs(True), torch.zeros(())
    for _ in range(USUAL + 3):
        graphs("shape", lambda: total.add_(1))
    assert len(taped) == 1 and total == USUAL + 3, "a capture is no pass, and a replay is one"
    assert graphs.rounded(1, 500) == graphs.rounded(STRIDE, 500) == STRIDE and graphs.rounded(499, 500) == 500
    graphs.clear()
    graphs("shape", lambda: total.add_(1))
    assert not graphs.captured and total == USUAL + 4


def test_a_pass_that_cannot_be_captured_ends_the_run(monkeypatch):
    def fail(self, work):
        raise RuntimeError("operation not permitted when stream is capturing\nCUDA kernel errors …")

    monkeypatch.setattr(Graphs, "_capture", fail)
    graphs, total = Graphs(True), torch.zeros(())
    for _ in range(USUAL):
        graphs(1, lambda: total.add_(1))
    with pytest.warns(RuntimeWarning, match=r"not captured \(operation not permitted when stream is capturing\)"):
        graphs(1, lambda: total.add_(1))
    graphs(1, lambda: total.add_(1))
    assert total == USUAL + 2 and not graphs.on and graphs.rounded(7, 500) == 7


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
        for _ in range(USUAL + 1):
            graphs(1, lambda: total.add_(1))
    assert current == ["default"] and not recording and not graphs.on
