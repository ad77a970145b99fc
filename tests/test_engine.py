"""The engine against the uncached model, against transformers, and against itself in other company."""

from collections import Counter
from functools import cache

import helpers
import pytest
import torch
from helpers import IMAGE, conversation, each_family, hf_twin, of_family, positions, random_image, report, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from mmsr.attention import sum_in_fp64
from mmsr.engine import Engine, GeneratedSequence, SequenceGroup, sample, sampling_key, slot_layout, uniform
from mmsr.episode import Episode, Example
from mmsr.pack import pack, split_into_micro_batches
from mmsr.update import ImageFeatures, Trainer

STOP = 115  # a token that the tiny model of Qwen2.5-VL likes
SUPPRESSED = torch.zeros(300, dtype=torch.bool)
SUPPRESSED[IMAGE:] = True
EXAMPLE = Example("e", b"", "", ())


def returned():
    """What "comes back" from a tool: text, a thumbnail, text. The same objects each time."""
    return _returned(helpers.FAMILY)


@cache
def _returned(family: str):
    return conversation(99, 5, random_image(4, 6, 8), 3)


def sharp():
    """A model that is sure enough that the stop token is likely, so that turns end at all lengths."""
    seed, liked = of_family(qwen2_5=(4, STOP), qwen3=(3, 241))
    model = tiny_model(seed)
    with torch.no_grad():
        model.lm_head.weight.mul_(4)
        model.lm_head.weight[[STOP, liked]] = model.lm_head.weight[[liked, STOP]]
    return model


@pytest.fixture
def model():
    return sharp()


def groups(n: int, sequences: int, seed: int = 0, first: int = 0) -> list[SequenceGroup]:
    made = []
    for i in range(first, first + n):
        ids, images = conversation(seed + i, 3 + i % 4, random_image(4 + 2 * (i % 3), 4, i), 2 + i % 5)
        keys = [sampling_key(seed, i, sample) for sample in range(sequences)]
        made.append(SequenceGroup(ids.tolist(), images, [GeneratedSequence(key) for key in keys]))
    return made


def run(model, batch: list[SequenceGroup], turns: int = 2, result=None, **options) -> Engine:
    """Generate `turns` turns per sequence, extended by `result` in between."""
    result = result or returned()
    options = dict(slots=64, max_tokens=120, turn_tokens=12) | options
    engine = Engine(model, STOP, SUPPRESSED.to(model.head_weight.device), **options)
    assert engine.submit(batch) == []
    left = Counter({sequence: turns for group in batch for sequence in group.sequences})
    while engine.busy:
        for sequence in engine.step():
            left[sequence] -= 1
            if left[sequence]:
                engine.extend(sequence, result[0].tolist(), result[1])
            else:
                engine.finish(sequence)
    assert not +left and not engine.by_slot
    assert all(group.scores is None for group in batch), "a megabyte for every prompt of an evaluation"
    return engine


def episodes(batch: list[SequenceGroup]) -> list[Episode]:
    made = []
    for i, group in enumerate(batch):
        for j, sequence in enumerate(group.sequences):
            n = len(group.ids)
            images = group.images + [(n + at, image) for at, image in sequence.images]
            lists = (group.ids + sequence.ids, [0] * n + sequence.loss_mask, [0.0] * n + sequence.logps)
            made.append(Episode(EXAMPLE, i, j, *lists, images, n))
    return made


def recomputed(model, made: list[Episode]) -> tuple[torch.Tensor, torch.Tensor]:
    """Trainer's and sampled log-probabilities of all sampled tokens."""
    device = model.head_weight.device
    trainer = Trainer(model, None, SUPPRESSED.to(device))
    ours, theirs = [], []
    with torch.no_grad():
        for part in split_into_micro_batches(made, 400):
            batch = pack(made, part, device)
            ours.append(trainer.log_probs(model, batch, ImageFeatures(model, batch.images, False))[0])
            theirs.append(batch.sampled_logps)
    return torch.cat(ours), torch.cat(theirs)


def begun(n: int = 5) -> list[SequenceGroup]:
    """Groups, some of whose sequences begin forced: of one group all, each with one more result than the last."""
    batch = groups(n, 4)
    for i, sequence in enumerate([batch[1].sequences[2], *batch[2].sequences]):
        for _ in range(i + 1):
            sequence.force(returned()[0].tolist(), returned()[1])
    return batch


def texts(batch: list[SequenceGroup]) -> list[list[int]]:
    return [sequence.ids for group in batch for sequence in group.sequences]


@each_family
@pytest.mark.parametrize("wide", [False, True])
def test_cached_logps_equal_uncached_ones(model, wide, record_property):
    """Prompt, two turns, a picture in the prompt and one in the result: the cache, the merge and the positions.

    Of attention summed in fp64, what is left is one rounding that fell the other way here or there.
    """
    sum_in_fp64(wide)
    batch = groups(5, 4)
    run(model, batch)
    made = episodes(batch)
    lengths = {sum(e.loss_mask) for e in made}
    assert len(lengths) > 5, "turns should end at many lengths"
    ours, sampled = recomputed(model, made)
    assert len(ours) == sum(sum(e.loss_mask) for e in made)
    gap = (ours - sampled).abs()
    report(record_property, f"sampled against trainer log-probabilities{', summed widely' * wide}", gap.max().item())
    assert gap.max() < 1e-5
    assert not wide or (gap == 0).float().mean() > 0.9


@each_family
def test_tokens_do_not_depend_on_who_else_is_in_the_batch(model):
    alone, crowd = groups(1, 3, first=4), groups(9, 3)
    run(model, alone)
    run(model, crowd)
    assert texts(alone) == texts(crowd[4:5])


@each_family
@pytest.mark.first_is_quick
@pytest.mark.parametrize("slots", [3, 1, 4, 7, 36])
def test_tokens_do_not_depend_on_the_number_of_slots(model, slots, monkeypatch):
    """Queueing, reuse of slots and rows, and moving the tail of a batch to the front change nothing.

    A group may be larger than the slots: its sequences come one after another.
    """
    wide, narrow = groups(9, 4), groups(9, 4)
    run(model, narrow, slots=slots, prefill_tokens=40)
    moved = []
    compact = Engine._compact
    monkeypatch.setattr(Engine, "_compact", lambda self: moved.append(self) or compact(self))
    run(model, wide, slots=64)
    assert moved
    assert texts(wide) == texts(narrow)


@pytest.fixture(scope="module")
def undivided():
    """What slots of full room give, by temperature."""
    model = sharp()
    sum_in_fp64(True)
    made = {temperature: begun() for temperature in (0, 1)}
    for temperature, batch in made.items():
        run(model, batch, turns=3, temperature=temperature, max_tokens=200)
    return made


@pytest.mark.first_is_quick
@pytest.mark.parametrize("slot_tokens, slots, temperature", [(1, 3, 1), (9, 8, 0), (9, 8, 1), (25, 64, 1)])
def test_the_room_of_a_slot_changes_tokens(model, undivided, slot_tokens, slots, temperature, monkeypatch):
    """Parked in a turn, at a result with its picture, at a forced beginning; by one, by groups, and all together."""
    sum_in_fp64(True)
    resumed, resume = [], Engine._resume_parked
    monkeypatch.setattr(Engine, "_resume_parked", lambda self: resumed.append(self) or resume(self))
    whole, short = undivided[temperature], begun()
    options = dict(slots=slots, slot_tokens=slot_tokens, temperature=temperature, prefill_tokens=60, max_tokens=200)
    engine = run(model, short, turns=3, **options)
    parked = engine.counts["parked"]
    assert parked == 20 if slot_tokens == 1 else 0 < parked <= 20, "at most once each"
    assert resumed == [engine] and not engine.parked
    assert texts(short) == texts(whole)
    for group, twin_group in zip(short, whole):
        for sequence, twin in zip(group.sequences, twin_group.sequences):
            assert (sequence.loss_mask, sequence.images, sequence.stopped) == (
                twin.loss_mask,
                twin.images,
                twin.stopped,
            )
            torch.testing.assert_close(torch.tensor(sequence.logps), torch.tensor(twin.logps), atol=1e-5, rtol=0)


def test_a_parked_turn_gets_its_limit_once_more(model):
    """Turns of 12 tokens that never stop, interrupted in the middle, before the first token and before the last."""
    second = 12 + len(returned()[0])  # where the second turn begins
    for slot_tokens in (5, 11, second, second + 1):
        batch = groups(2, 3)
        engine = Engine(model, 299, SUPPRESSED, slots=4, slot_tokens=slot_tokens, max_tokens=120, turn_tokens=12)
        engine.submit(batch)
        turns = Counter()
        while engine.busy:
            for sequence in engine.step():
                turns[sequence] += 1
                if turns[sequence] == 1:
                    engine.extend(sequence, returned()[0].tolist(), returned()[1])
                else:
                    engine.finish(sequence)
        assert engine.counts["parked"] == 6
        for sequence in turns:
            assert sequence.loss_mask == [1] * 12 + [0] * len(returned()[0]) + [1] * 12
            assert turns[sequence] == 2, "a turn is returned once, whole"


def test_slots_are_divided_while_a_sequence_is_at_a_tool(model):
    """The parked ones wait for it: its keys are in its slot."""
    whole, short = groups(1, 2), groups(1, 2)
    limits = dict(slots=2, max_tokens=120, turn_tokens=6)
    made = []
    for batch, slot_tokens in ((whole, 0), (short, 9)):
        engine = Engine(model, 299, SUPPRESSED, slot_tokens=slot_tokens, **limits)
        engine.submit(batch)
        ended = []
        while engine.busy:
            ended += engine.step()
        first, second = ended
        engine.extend(first, returned()[0].tolist(), returned()[1])
        if slot_tokens:
            assert not engine.busy and not engine.step() and engine.cache.room == slot_tokens
        engine.extend(second, [7])  # it fits: the second turn begins in the short slot
        left = [first, second]
        while left:
            assert engine.busy
            for sequence in engine.step():
                left.remove(sequence)
                engine.finish(sequence)
        assert not engine.busy
        made.append(engine)
    assert texts(short) == texts(whole)
    assert made[1].counts["parked"] == 2
    # The prompt once more; what the first had sampled, without the last token; and all that the second had.
    assert made[1].counts["prefilled"] - made[0].counts["prefilled"] == len(short[0].ids) + 5 + 9
    assert made[1].counts["images_encoded"] == made[0].counts["images_encoded"]


@pytest.mark.parametrize("slots, slot_tokens", [(6, 10), (3, 40), (2, 10), (4, 0)])
def test_the_second_division_takes_more_memory(model, slots, slot_tokens):
    """Parked sequences get the memory that there is, unless it is too little for a single long slot."""
    batch = groups(2, 3)
    engine = Engine(model, STOP, SUPPRESSED, slots=slots, slot_tokens=slot_tokens, max_tokens=70, turn_tokens=50)
    engine.submit(batch)
    before = [tensor.data_ptr() for pair in engine.cache.suffix for tensor in pair]
    longest = 70 - min(len(group.ids) for group in batch) + 1
    room = slot_tokens or longest
    assert engine.cache.suffix[0][0].shape[:2] == (slots, room)
    places = {tensor.shape[0] for pair in engine.cache.places for tensor in pair}
    assert places == {max(slots * room, longest)}
    while engine.busy:
        for sequence in engine.step():
            engine.finish(sequence)
    if slot_tokens:
        assert engine.counts["parked"]
        assert engine.cache.suffix[0][0].shape[:2] == (max(1, slots * room // longest), longest)
    assert before == [tensor.data_ptr() for pair in engine.cache.suffix for tensor in pair]


def test_the_plan_divides_the_cache_in_another_way():
    assert slot_layout(64, 2048, 7937) == (2048, 16)
    assert slot_layout(64, 0, 7937) == slot_layout(64, 9000, 7937) == (7937, 64)
    assert slot_layout(2, 2048, 7937) == (2048, 1), "a slot that holds the longest conversation there must be"


@each_family
def test_fork_equals_separate_prompts(model):
    forked, separate = groups(1, 4), [groups(1, 1)[0] for _ in range(4)]
    for group, sequence in zip(separate, forked[0].sequences):
        group.sequences[0].key = sequence.key
    engine, other = run(model, forked), run(model, separate)
    assert texts(forked) == texts(separate)
    assert other.counts["prefilled"] - engine.counts["prefilled"] == 3 * len(forked[0].ids)
    assert engine.counts["images_encoded"] == 2


@each_family
def test_greedy_tokens_equal_transformers_generate(model):
    batch = groups(3, 1)
    run(model, batch, turns=1, temperature=0, turn_tokens=20)
    twin = hf_twin(model)
    for group in batch:
        ids, images = torch.tensor(group.ids), group.images
        out = ids
        while len(out) < len(ids) + 20 and (len(out) == len(ids) or out[-1] != STOP):
            kinds = dict(pixel_values=torch.cat([i.patches for _, i in images]))
            kinds["image_grid_thw"] = torch.tensor([(1, *i.grid) for _, i in images])
            with torch.no_grad():
                scores = twin(input_ids=out[None], position_ids=positions(out, images)[:, None], **kinds).logits[0, -1]
            out = torch.cat([out, scores.masked_fill(SUPPRESSED, -1e9).argmax()[None]])
        assert out[len(ids) :].tolist() == group.sequences[0].ids


@each_family
def test_opening_that_is_forced_equals_the_one_that_was_sampled(model):
    """A forced first turn gives the same continuation as sampling that very turn did."""
    free, forced = groups(2, 2), groups(2, 2)
    run(model, free)
    for group, other in zip(free, forced):
        for sequence, twin in zip(group.sequences, other.sequences):
            first = sequence.loss_mask.index(0)
            twin.force(sequence.ids[: first + len(returned()[0])], [(first + at, image) for at, image in returned()[1]])
    run(model, forced, turns=1)
    assert texts(free) == texts(forced)


def test_the_host_waits_for_the_device_for_every_turn_that_ends(model, monkeypatch):
    """Once a step, to see whose turn is over; and where turns are, for all their integers and log-probabilities."""
    waits, copies, ended = [], set(), set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func._schema.name == "aten::index" and any(i is not None and i.dtype == torch.bool for i in args[1]):
                waits.append("a mask becomes an index")
            return func(*args, **(kwargs or {}))

    def copied(tensor):
        waits.append("a copy")
        here = tensor.clone()
        copies.add(here.untyped_storage().data_ptr())
        return here

    def reading(plain):
        def read(tensor):
            assert tensor.untyped_storage().data_ptr() in copies, "it is read on the device"
            return plain(tensor)

        return read

    def decode(engine, plain=Engine._decode):
        waits.clear()
        with Watch(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "cpu", copied)
            for name in ("tolist", "item", "__int__", "__bool__", "__float__"):
                patch.setattr(torch.Tensor, name, reading(getattr(torch.Tensor, name)))
            over = plain(engine)
        ended.add(len(over))
        assert len(waits) == (3 if over else 1), waits
        return over

    monkeypatch.setattr(Engine, "_decode", decode)
    run(model, groups(3, 8))
    assert {0, 1, 2} <= ended


def test_sequence_out_of_room_stops_and_prompt_without_room_is_refused(model):
    batch = groups(2, 2)
    longest = max(len(group.ids) for group in batch)
    engine = Engine(model, 299, SUPPRESSED, slots=8, max_tokens=longest, turn_tokens=50)
    refused = engine.submit(batch)
    assert refused
    for sequence in refused:
        assert len(sequence.group.ids if sequence.group else batch[1].ids) <= longest
    while engine.busy:
        for sequence in engine.step():
            assert not sequence.stopped and len(sequence.group.ids) + len(sequence.ids) == longest
            engine.finish(sequence)


def test_banned_ids_are_never_sampled_and_sampling_follows_the_distribution():
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.2])
    scores = probabilities.clamp(min=1e-30).log().masked_fill(probabilities == 0, -1e30).expand(20_000, 4)
    noise = uniform(torch.full((20_000,), sampling_key("x")), torch.arange(20_000))
    tokens, logps = sample(scores, noise, greedy=False)
    share = torch.bincount(tokens, minlength=4) / 20_000
    assert share[1] == 0
    assert (share - probabilities).abs().max() < 0.015
    torch.testing.assert_close(logps, probabilities[tokens].log())
    edge = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert sample(scores[:2], edge, greedy=False)[0].tolist() == [0, 3]


def test_uniform_is_uniform_and_uncorrelated_between_keys_and_tokens():
    keys = torch.tensor([sampling_key(0, step, group) for step in range(40) for group in range(50)])
    draws = torch.stack([uniform(keys, torch.full_like(keys, t)) for t in range(50)], 1)  # (2000, 50)
    assert 0 <= draws.min() and draws.max() < 1
    assert abs(draws.mean() - 0.5) < 0.004 and abs(draws.var() - 1 / 12) < 0.002
    for a, b in [(draws[:, :-1], draws[:, 1:]), (draws[:-1], draws[1:])]:
        assert torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].abs() < 0.01
