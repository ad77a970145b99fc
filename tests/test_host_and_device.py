"""What stays on the host and what is on the device, told apart without a device.

The meta device plays the GPU: its tensors have no values, and everything that stays on the host is on the CPU. `Apart`
refuses every operator that gets tensors of both, which on CUDA is an error, or a copy that nobody sees and that a
capture does not allow. Where the host asks for a value, it is given 1.
"""

import pytest
import torch
from helpers import conversation, each_family, random_image, tiny_config
from test_engine import STOP, SUPPRESSED, returned
from test_update import made
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmsr import attention, grpo
from mmsr.attention import Cached
from mmsr.engine import Engine, GeneratedSequence, SequenceGroup
from mmsr.system.optimizer import MasterWeights
from mmsr.update import Trainer

COPIES = {"aten::_to_copy", "aten::copy_"}


class Apart(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func._schema.name
        tensors = [x for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)]
        devices = {x.device.type for x in tensors if x.ndim or x.device.type == "meta"}  # a host's scalar is no tensor
        assert len(devices) < 2 or name in COPIES, f"{func} gets tensors of host and device"
        if name == "aten::_local_scalar_dense" and "meta" in devices:
            return 1
        if name == "aten::nonzero" and "meta" in devices:
            return args[0].new_empty(1, args[0].ndim, dtype=torch.long)
        return func(*args, **kwargs)


def mask(queries, keys):
    return torch.ones(queries, keys, dtype=torch.bool, device="meta").tril(keys - queries)


@pytest.fixture(params=["sdpa", "varlen"])
def apart(request, monkeypatch):
    """Both ways to attend; a GPU's is in half precision."""
    monkeypatch.setattr(attention, "backend", lambda q: request.param)
    monkeypatch.setattr(attention, "_sum_dtype", lambda q: q.dtype)
    monkeypatch.setattr(attention, "causal_lower_right", mask)  # torch's is of a class that no mode can watch
    dtype = torch.bfloat16 if request.param == "varlen" else torch.float32
    with torch.device("meta"):
        model = tiny_config().build().to(dtype)
    with Apart():
        yield model


class Blind(Engine):
    """Turns end after three tokens, as values are not known."""

    def _end_turns(self, slots, over):
        assert slots.device.type == over.device.type == "meta" and over.dtype == torch.bool
        running = [sequence for sequence in self.by_slot.values() if sequence.start_step is not None]
        steps = self.counts["decode_steps"]
        ended = [sequence for sequence in running if steps - sequence.start_step >= 2 + sequence.slot % 2]
        self.num_running -= len(ended)
        room = self.cache.room
        for sequence in ended:
            slots = torch.tensor([sequence.slot], device="meta")
            self.state.running[slots] = False
            numbers, logps = self._turns_of(slots)
            assert numbers.shape == (1, 3 + room) and numbers.dtype == torch.long
            assert logps.shape == (1, room) and logps.dtype == torch.float32
            numbers = torch.zeros(3 + room, dtype=torch.long)
            numbers[0] = sequence.slot
            numbers[1] = len(sequence.ids) + 2
            numbers[2] = sequence.position + 3
            self._take_sampled(numbers, torch.zeros(room))
        return ended


@each_family
@pytest.mark.first_is_quick
def test_a_rollout_mixes_host_and_device(apart):
    """Prefill with pictures, openings, results of tools, decoding, slots: waited for, compacted, and divided again."""
    groups = []
    for number in range(5):
        ids, images = conversation(number, 4, random_image(4, 6, number), 3 + number)
        groups.append(SequenceGroup(ids.tolist(), images, [GeneratedSequence(key) for key in range(3)]))
    groups[1].sequences[0].force(returned()[0].tolist(), returned()[1])
    engine = Blind(apart, STOP, SUPPRESSED.to("meta"), slots=8, slot_tokens=20, max_tokens=120, turn_tokens=30)
    assert engine.submit(groups) == []
    compacted, compact = [], engine._compact
    engine._compact = lambda: compacted.append(True) or compact()
    extended = set()
    while engine.busy:
        for sequence in engine.step():
            if sequence in extended or sequence.key == 2:
                engine.finish(sequence)
            else:
                extended.add(sequence)
                engine.extend(sequence, returned()[0].tolist(), returned()[1])
    assert len(extended) == 10 and compacted and not engine.by_slot
    assert engine.counts["parked"] == 1


@pytest.mark.first_is_quick
@pytest.mark.parametrize(
    "each_family, loss",
    [("qwen3", "grpo"), ("qwen2_5", "grpo"), ("qwen2_5", "gspo"), ("qwen2_5", "cispo")],
    indirect=["each_family"],
)
def test_an_update_mixes_host_and_device(each_family, apart, loss):
    """Tower, micro-batches, π_old, reference, loss, statistics, clipping, and fp32 weights' optimizer step."""
    fp32 = apart.head_weight.dtype == torch.float32
    with torch.device("meta"):
        reference = tiny_config().build().to(apart.head_weight.dtype).requires_grad_(False)
    optimizer = MasterWeights(apart, fused=False)  # torch has no fused kernel on meta
    if not fp32:
        optimizer.step = lambda lr: None  # the meta device has no random numbers to round with
    options = dict(loss=loss, kl=0.1, importance_cap=2.0, importance_bound=9.0)
    trainer = Trainer(apart, optimizer, SUPPRESSED.to("meta"), reference=reference, micro_tokens=60, **options)
    episodes = made()
    metrics = trainer.step([[e for e in episodes if e.group_id == 0], [e for e in episodes if e.group_id > 0]], 1e-3)
    assert metrics["skipped_updates"] == 0 and metrics["trained"] > 0


def test_a_range_without_its_device_goes_unnoticed(apart, monkeypatch):
    """The check itself: such a slip must end a decode step and an update."""
    plain = Cached.__init__

    def slipped(self, prefix_lens, group_slots, slot_mapping, suffix_lens):
        plain(self, prefix_lens, group_slots, slot_mapping, suffix_lens + torch.arange(len(suffix_lens)))

    monkeypatch.setattr(Cached, "__init__", slipped)
    with pytest.raises(AssertionError, match="host and device"):
        test_a_rollout_mixes_host_and_device(apart)
    monkeypatch.setattr(grpo, "token_losses", lambda logps, *rest: logps * torch.arange(len(logps)))
    with pytest.raises(AssertionError, match="host and device"):
        test_an_update_mixes_host_and_device(None, apart, "grpo")
