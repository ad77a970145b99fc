"""How full the slots are and how many decode steps are replayed, on recorded lengths, by the real engine.

What a GPU would wait for is counted here in decode steps: with turns of recorded lengths, tools that answer at once,
and CUDA's part of the captures played by a model of it (`FakeCuda`).
"""

import pytest
from helpers import conversation, tiny_model
from test_engine import SUPPRESSED
from test_graphs import FakeCuda

from mmsr.engine import Engine, GeneratedSequence, SequenceGroup, prefix_rows, sampling_key

# Tokens of each model turn in 26 conversations that MMSearch-R1-7B had about FVQA's questions.
TURNS = [
    [73, 74], [66], [106], [62, 58, 55], [91], [74, 107, 73], [79], [96, 88, 98], [77, 106], [87], [89, 87],
    [69, 72, 86], [85, 77, 71], [84, 55], [90], [72, 69, 88], [107, 63], [93, 81], [76, 59, 93], [68, 56, 69],
    [90, 116, 104], [74, 73], [96], [63, 62, 58], [102, 104, 80], [55, 61, 63],
]  # fmt: skip
RESULT = conversation(7, 20)[0].tolist()  # what comes back between two turns
SLOTS = 64
NEVER = 299  # a banned token: a turn ends where its recorded length is reached


class Recorded(Engine):
    """Ends every turn at its recorded length, and counts how many slots are decoding."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.busy_slots, self.full_steps, self.long_steps = 0.0, 0, 0

    def _turn_limit(self, sequence):
        return len(sequence.ids) + sequence.lengths.pop(0)

    def _decode(self):
        if self.waiting_groups or self.waiting:
            self.full_steps += 1
            self.busy_slots += self.num_running / len(self.state.token)
        self.long_steps += self.cache.room > self.slot_tokens > 0
        return super()._decode()

    @property
    def occupancy(self) -> float:
        """Share of the slots that decode, while a sequence waits for one."""
        return self.busy_slots / self.full_steps


def play(model, size: int, groups: int, tokens: int | None = None, seed: int = 0, found=RESULT, **options) -> Recorded:
    """Run `groups` groups of `size` sequences through 64 slots, every sequence with the lengths of some conversation.

    `tokens`: what every turn has instead.
    """
    ids = conversation(seed, 12)[0].tolist()
    batch = []
    for number in range(groups):
        sequences = [GeneratedSequence(sampling_key(seed, number, i)) for i in range(size)]
        for sequence in sequences:
            sequence.lengths = list(TURNS[sequence.key % len(TURNS)]) if tokens is None else [tokens]
        batch.append(SequenceGroup(ids, [], sequences))
    options = dict(slots=SLOTS, max_tokens=500, turn_tokens=200) | options
    engine = Recorded(model, NEVER, SUPPRESSED, **options)
    engine.submit(batch)
    while engine.busy:
        for sequence in engine.step():
            if sequence.lengths:
                engine.extend(sequence, found)
            else:
                engine.finish(sequence)
    for group in batch:
        for sequence in group.sequences:
            assert not sequence.lengths and len(sequence.ids) >= (tokens or 50)
    return engine


@pytest.fixture(scope="module")
def model():
    return tiny_model(4)


@pytest.mark.slow
@pytest.mark.parametrize("size, groups", [(4, 24), (32, 9)])
def test_slots_stand_empty_while_somebody_waits(model, size, groups):
    """A group's slowest sequence must not keep the slots of the others empty."""
    engine = play(model, size, groups)
    print(f"groups of {size}: {engine.occupancy:.1%} of the slots busy, {engine.counts['decode_steps']} decode steps")
    assert engine.occupancy >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize("size, groups", [(4, 24), (32, 3)])
def test_decode_steps_are_seldom_replayed(model, size, groups, monkeypatch):
    """Of a whole rollout, its tail included. A capture takes as long as a plain step, so they must be few as well."""
    cuda = FakeCuda(monkeypatch)
    engine = play(model, size, groups)
    steps = engine.counts["decode_steps"]
    print(f"groups of {size}: {cuda.replays} of {steps} steps replayed, {cuda.captures} captures")
    assert engine.graphs.on, "a capture failed"
    assert cuda.replays == engine.graphs.replayed >= 0.95 * steps
    assert cuda.captures <= 40


@pytest.mark.slow
@pytest.mark.parametrize("slot_tokens", [2048, 1100, 1024])
def test_real_conversations_outgrow_their_slots(model, slot_tokens):
    """With results of 400 tokens: none does in the recipes' slots. The cost where one in twenty, or in three, does."""
    found = conversation(7, 400)[0].tolist()
    engine = play(model, 8, 12, found=found, max_tokens=8192, slot_tokens=slot_tokens)
    parked, steps, more = engine.counts["parked"], engine.counts["decode_steps"], engine.long_steps
    prefilled = engine.counts["prefilled"]
    print(
        f"slots of {slot_tokens}: {parked} of 96 parked, {more} of {steps} decode steps for them, {prefilled} prefilled"
    )
    assert (parked == 0) == (slot_tokens == 2048)
    assert more < (0.05 if parked < 10 else 0.5) * steps


def test_the_plan_counts_fewer_rows_than_the_engine_makes(model):
    engine = play(model, 8, 20, tokens=2)
    assert len(engine.layout.prefix_lens) == prefix_rows(20, SLOTS, 8) == 17
    assert prefix_rows(512, 64, 1) == 64, "a row in use has a slot"
    assert prefix_rows(3, 64, 32) == 3
