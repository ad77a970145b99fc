"""Generation: batched sampling over a KV cache, for conversations that stop, wait for a tool, and continue.

A *group* is one prompt with several *sequences*: the conversations that begin with it. The cache has two parts. A *row*
holds the keys and values of a group's prompt and pictures, which are prefilled once for all its sequences. A *slot*
holds those of one sequence's own tokens. Here two groups, A and B, share two slots:

    time ───────────────────────────────────────────────────────►
    row 0     prompt A ································|
    row 1                        prompt B ·······················
    slot 0    A1 ━━━━━━━━━....+━━━━━━━━━━━━━━━━━━━━━━━━|B2 ━━━━━━
    slot 1    A2 ━━━━━━|A3 ━━━━━|B1 ━━━━━━━━━....+━━━━━━━━━━━━━━━

    ━ running: one token each step    . a tool works    + its result is prefilled    | finished

The states of a sequence, and the methods of `Engine` that move it on:

    submit ─► waiting ── _admit ─► prefilling ── _prefill_sequences ─► running ── _decode ─► at a tool ── finish ─►
                 ▲                     ▲                                  │                      │
                 │                     └──────────────────────────────────┼─────── extend ───────┤
                 └────── _resume_parked ────── parked ◄───────────────────┴──────────────────────┘

    waiting       It has no slot. Its group has no row yet (`waiting_groups`), or it has one (`waiting`).
    prefilling    It has tokens that are not in the cache: a tool's result, or a beginning that was forced. Without
                  such a beginning it goes from waiting to running, as the prompt's scores give its first token.
    running       It samples a token in each decode step, until the stop token or the limit of the turn.
    at a tool     Its turn is over, and it keeps its slot until the caller extends or finishes it.
    parked        Its slot was too short (below), so it has none. The host keeps its tokens.

There is no barrier between turns: the other sequences decode meanwhile. There is none between groups either: a freed
slot is taken at once by the next sequence. A row is freed by the last sequence of its group. So there are more rows
than groups that fit into the slots: otherwise the slowest sequence of every group would keep slots empty.

Unlike vLLM's cache, this one has no pages: a slot is one piece of memory. In the plain form (`slot_tokens` 0) it has
room for the longest conversation. Few are that long, so most of that memory would never be filled. Slots may therefore
be shorter. Then there are two phases, in the same memory:

    slot 0    A1 ━━━━━━━━━━|B1 ━━━━━━━━━━━━━━━▷         ┃    slot 0    A2 ▒▒▒▒▒▒━━━━━━━━━━|B1 ▒▒▒▒▒━━━━━━━━━━━━━━━━━
    slot 1    A2 ━━━━━━━━━━━━━━━▷|B2 ━━━━━━━━━━━━━━|    ┃

    ▷ its slot is full: it is parked    ▒ its prompt and its own tokens are prefilled again

When only parked sequences are left, `_resume_parked` divides the memory into fewer slots, each with room for the
longest conversation. There they continue, as if their tokens so far had been forced. This is vLLM's preemption by
recomputation, at most once a sequence. Like the number of slots, their room changes no token but by rounding.

All that changes with every token is in tensors on the device. The host waits for the device once a decode step, to see
whose turn is over, and does no work per token. On CUDA it launches the step as one graph (graphs.py).

Sampling is a pure function of (seed key, token index): inverse CDF of a counter-based uniform, no generator, no state.
It takes `scores`: logits over the temperature, in which suppressed ids have probability 0 (`model.logits`).

The plain form is `sample_turn` in examples/plain_grpo.py: one rollout at a time, and the model computes the whole past
again for every token.

Shape letters: S slots, R rows, G sequences of a group at most, K key/value heads, P room of a row, L room of a slot,
D head size, d hidden size, V vocabulary, N packed tokens, M packed keys, I image tokens, E turns that ended, n some
of the slots.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter, deque
from dataclasses import dataclass, field
from functools import partial
from heapq import heappop, heappush
from typing import Sequence

import torch
from torch import Tensor

from mmsr import attention
from mmsr.attention import AttentionFn, Cached, Packed, Segments, packed_attention
from mmsr.model import ModelConfig, VLModel, logits, mrope_positions
from mmsr.system.fuse import fused
from mmsr.system.graphs import Graphs
from mmsr.vision import Image

# ---- what is generated


@dataclass(eq=False)
class GeneratedSequence:
    """One conversation being generated. `ids`, `logps` and `loss_mask` are aligned, and may begin forced."""

    key: int  # seeds its randomness; see `sampling_key`
    ids: list[int] = field(default_factory=list)  # everything after the prompt
    logps: list[float] = field(default_factory=list)  # 0 where a token was forced
    loss_mask: list[int] = field(default_factory=list)  # 1 where it was sampled
    images: list[tuple[int, Image]] = field(default_factory=list)  # (offset within ids, picture)
    stopped: bool = False  # the last turn ended with the stop token, not out of room

    # Only the engine writes these.
    start: int = 0  # where in `ids` the tokens begin that it samples, or sampled last
    limit: int | None = None  # its turn ends with so many `ids`; None between turns. A parked turn keeps its limit.
    cached: int = 0  # how many of `ids` are in the cache; while it is running, as of the beginning of the turn
    start_step: int | None = None  # the engine's count of decode steps when the turn began; None if it is not running
    position: int = 0  # rotary position of the first token that is not in the cache
    slot: int = -1
    group: SequenceGroup | None = None  # None until `submit` accepts it

    def force(self, ids: list[int], images: Sequence[tuple[int, Image]] = ()) -> None:
        """Append tokens that are given, not sampled. `images`: (offset within these tokens, picture)."""
        for offset, image in images:
            self.images.append((len(self.ids) + offset, image))
        self.ids += ids
        self.logps += [0.0] * len(ids)
        self.loss_mask += [0] * len(ids)


@dataclass(eq=False)
class SequenceGroup:
    """A prompt and the sequences that share it."""

    ids: list[int]
    images: list[tuple[int, Image]]  # (offset within ids, picture)
    sequences: list[GeneratedSequence]

    # Only the engine writes these.
    row: int = -1
    members: list[GeneratedSequence] = field(default_factory=list)  # that wait or have a slot: they need the row
    scores: Tensor | None = None  # (V,) after the prompt: every sequence's first token is drawn from them


@dataclass
class NewTokens:
    """Tokens to prefill in one pass with others: a prompt, or what was appended to a sequence."""

    ids: list[int]
    images: list[tuple[int, Image]]  # (offset within ids, picture)
    position: int  # rotary position of the first token


# ---- sampling


# splitmix64: "Fast Splittable Pseudorandom Number Generators" (Steele, Lea, Flood, 2014), with the constants of Vigna's
# splitmix64.c. The first is 2^64 over the golden ratio. Tensors have no uint64 arithmetic, so these are the int64 with
# the same bits. Products wrap around, signed or not.
GOLDEN_GAMMA = 0x9E3779B97F4A7C15 - 2**64
MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
MIX_2 = 0x94D049BB133111EB - 2**64


def sampling_key(*parts: object) -> int:
    """64 bits from (seed, step, group, sample, …): equal parts give equal samples, whatever else is in the batch."""
    text = "/".join(str(part) for part in parts)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def uniform(key: Tensor, index: Tensor) -> Tensor:
    """Counter-based uniforms in [0, 1), float64, shaped like `key` and `index`, int64.

    Number `index` of the splitmix64 generator that starts at `key`: its state is key + (index + 1) · GOLDEN_GAMMA.
    """

    def shift_right(x: Tensor, bits: int) -> Tensor:
        """x >> bits as if x had no sign: int64 shifts copies of the sign in, which are cut off."""
        return (x >> bits) & ((1 << (64 - bits)) - 1)

    x = key + (index + 1) * GOLDEN_GAMMA
    x = (x ^ shift_right(x, 30)) * MIX_1
    x = (x ^ shift_right(x, 27)) * MIX_2
    x = x ^ shift_right(x, 31)
    return shift_right(x, 11).double() * 2.0**-53  # the upper 53 bits: as many as a float64 holds


@fused
def probabilities(logps: Tensor) -> Tensor:
    return logps.double().exp()


def sample(scores: Tensor, noise: Tensor, greedy: bool) -> tuple[Tensor, Tensor]:
    """Token ids and their log-probabilities (n,) under softmax(`scores` (n, V)), by inverse CDF of `noise` (n,)."""
    logps = scores.log_softmax(-1)  # (n, V)
    if greedy:
        tokens = scores.argmax(-1)  # (n,)
    else:
        cdf = probabilities(logps).cumsum(-1)  # (n, V)
        target = noise * cdf[:, -1]  # (n,) the last entry is 1 but for rounding
        tokens = torch.searchsorted(cdf, target[:, None], right=True)[:, 0]  # (n,) the first with cdf > target
        tokens = tokens.clamp_(max=scores.shape[1] - 1)  # where the product was rounded up to the last entry
    logps = logps.gather(1, tokens[:, None])[:, 0]  # (n,)
    return tokens, logps


# ---- memory


def prefix_rows(prompts: int, slots: int, smallest_group: int) -> int:
    """How many prompts the cache holds at once, for `slots` conversations in groups of at least `smallest_group`.

    Twice as many as fill the slots, and one: a group's slowest sequences keep its row while the next groups run.
    On recorded lengths that keeps the slots full (tests/test_occupancy.py). A row in use has at least one slot.
    """
    return min(prompts, slots, 2 * math.ceil(slots / smallest_group) + 1)


def slot_layout(slots: int, slot_tokens: int, longest: int) -> tuple[int, int]:
    """How `slots` conversations share the cache: (room of a slot, long slots that the same memory makes later).

    `longest`: the room that the longest conversation needs; a slot has that of `slot_tokens` if it is less and not 0.
    All in tokens. There is at least one long slot, so the cache has max(slots * room, long slots * `longest`) places.
    """
    room = min(slot_tokens or longest, longest)
    return room, max(1, slots * room // longest)


class Cache:
    """Keys and values of every layer: `prefix` rows (R, P, K, D) and `suffix` slots (S, L, K, D); and which are free.

    It has its full size from the beginning: CUDA graphs know its addresses, and what does not fit should fail at once
    and not hours into a run. `divide` makes slots of its `places`, and may do so again.
    """

    def __init__(self, config: ModelConfig, rows: int, prompt_room: int, places: int, device, dtype):
        shape = (config.num_key_value_heads, config.head_dim)

        def zeros(tokens: int) -> Tensor:
            # Zeros, because attention multiplies what is beyond a sequence by 0, and 0 · NaN is NaN.
            return torch.zeros(tokens, *shape, device=device, dtype=dtype)

        self.kernel = attention.has_decode_kernel(torch.empty(0, device=device, dtype=dtype))
        self.prefix: list[tuple[Tensor, Tensor]] = []  # (keys, values) of each layer
        self.places: list[tuple[Tensor, Tensor]] = []  # (places, K, D) each: the memory of the slots
        for _ in range(config.num_hidden_layers):
            keys, values = zeros(rows * prompt_room), zeros(rows * prompt_room)
            self.prefix.append((self._view(keys, rows, prompt_room), self._view(values, rows, prompt_room)))
            self.places.append((zeros(places), zeros(places)))
        self.rows = rows
        self.free_rows = list(range(rows))  # a heap: the lowest is taken first

    def divide(self, slots: int, room: int) -> None:
        """Make the memory `slots` of `room` tokens each, all free. What the slots held before is lost."""
        self.suffix = [(self._view(k, slots, room), self._view(v, slots, room)) for k, v in self.places]
        self.room = room
        self.free_slots = list(range(slots))  # a heap

    def _view(self, places: Tensor, count: int, length: int) -> Tensor:
        """The first of `places` (n, K, D) as (count, length, K, D)."""
        heads, head_dim = places.shape[1:]
        used = places[: count * length]
        if self.kernel:
            return used.view(count, length, heads, head_dim)
        # The same shape, but the keys of a head are contiguous: plain products are faster with that.
        return used.view(count, heads, length, head_dim).transpose(1, 2)


class SlotState:
    """What the device knows of each slot. Tensors are written in place only: CUDA graphs know their addresses."""

    def __init__(self, slots: int, room: int, device: torch.device):
        def zeros(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.token = zeros(torch.long, slots)  # (S,) that is fed next
        self.length = zeros(torch.long, slots)  # (S,) tokens in the cache
        self.position = zeros(torch.long, slots)  # (S,) rotary position of `token`
        self.key = zeros(torch.long, slots)  # (S,) see `sampling_key`
        self.limit = zeros(torch.long, slots)  # (S,) sampling ends with so many tokens after the prompt
        self.running = zeros(torch.bool, slots)  # (S,)
        self.ids = zeros(torch.long, slots, room)  # (S, L) what was sampled, by index after the prompt
        self.logps = zeros(torch.float32, slots, room)  # (S, L) of `ids`

    def move_to_front(self, slots: list[int]) -> None:
        """Give slot i the state of slot slots[i]. The slots after these are not running any more."""
        for tensor in vars(self).values():
            tensor[: len(slots)] = tensor[slots]
        self.running[len(slots) :] = False


class DecodeLayout:
    """Which slots share which prompt, as `attention.Cached` wants it. Written in place too.

    The tensors have room for everything; a step uses their beginning.
    """

    def __init__(self, rows: int, slots: int, group_size: int, device: torch.device):
        self.device = device
        self.largest_group = group_size
        self.prefix_lens = torch.zeros(rows, dtype=torch.long, device=device)  # (R,)
        self.group_slots = torch.zeros(rows * group_size, dtype=torch.long, device=device)  # (R * G,)
        self.slot_mapping = torch.zeros(slots, dtype=torch.long, device=device)  # (S,)

    def write(self, by_slot: dict[int, GeneratedSequence], num_slots: int, num_rows: int, group_size: int) -> None:
        """Write the layout of the sequences `by_slot`, for steps of these sizes."""
        # An empty slot is computed with the others. It sees some row that has a prompt: what attention gives for no
        # keys depends on the kernel, and a NaN in the cache would spread to the slot's next sequence.
        any_row = next(iter(by_slot.values())).group.row
        prefix_lens = [0] * num_rows  # (R,) tokens of each row's prompt
        group_slots = [0] * (num_rows * group_size)  # (R * G,) the slots of each row's sequences, slot 0 as filler
        slot_mapping = [any_row * group_size] * num_slots  # (S,) where each slot is in `group_slots`
        columns_used: Counter[SequenceGroup] = Counter()  # of a group's row in `group_slots`
        for slot, sequence in by_slot.items():
            group = sequence.group
            index = group.row * group_size + columns_used[group]
            columns_used[group] += 1
            prefix_lens[group.row] = len(group.ids)
            group_slots[index] = slot
            slot_mapping[slot] = index
        self.prefix_lens[:num_rows] = torch.tensor(prefix_lens, device=self.device)
        self.group_slots[: len(group_slots)] = torch.tensor(group_slots, device=self.device)
        self.slot_mapping[:num_slots] = torch.tensor(slot_mapping, device=self.device)

    def cached(self, num_slots: int, num_rows: int, group_size: int, suffix_lens: Tensor) -> Cached:
        """The attention of a step. The sizes are those that were given to `write`."""
        return Cached(
            prefix_lens=self.prefix_lens[:num_rows],
            group_slots=self.group_slots[: num_rows * group_size].view(num_rows, group_size),
            slot_mapping=self.slot_mapping[:num_slots],
            suffix_lens=suffix_lens,
        )


# ---- the engine


class Engine:
    """Generates for `model`: `submit` groups once, then `step` while `busy`; finish or extend what it returns.

    `max_tokens` bounds a conversation with its prompt, `turn_tokens` what is sampled in one turn. `temperature` 0 is
    greedy, with log-probabilities at 1. `slot_tokens`: see `slot_layout`. `prefill_tokens` bounds one pass over new
    prompts. `capture`: on CUDA, replay decode steps from graphs. `features`: of encoded images, by content; what it
    lacks is added to it. The model's weights may not change or move while the engine lives.
    """

    # Memory: `submit` makes it, because then its sizes are known.
    cache: Cache
    state: SlotState
    layout: DecodeLayout
    long_layout: tuple[int, int]  # of slots for parked sequences: how many, and the room of each

    def __init__(
        self,
        model: VLModel,
        stop_id: int,
        suppressed: Tensor,  # (V,) bool: ids that may not be sampled
        *,
        slots: int,
        slot_tokens: int = 0,
        max_tokens: int,
        turn_tokens: int,
        temperature: float = 1.0,
        prefill_tokens: int = 16384,
        capture: bool = True,
        features: dict[str, Tensor] | None = None,
    ):
        self.model = model
        self.stop_id = stop_id
        self.suppressed = suppressed
        self.device = suppressed.device
        self.slots = slots
        self.slot_tokens = slot_tokens
        self.max_tokens = max_tokens
        self.turn_tokens = turn_tokens
        self.greedy = temperature == 0
        self.temperature = temperature or 1.0
        self.prefill_tokens = prefill_tokens
        self.graphs = Graphs(capture and self.device.type == "cuda")
        self.counts: Counter = Counter()  # prefilled, decode_steps, images_encoded, parked
        self.features = {} if features is None else features  # encoded images, by content
        # Sequences by their states, and all that have a slot: prefilling, running or at a tool.
        self.waiting_groups: deque[SequenceGroup] = deque()  # have no row yet
        self.waiting: deque[GeneratedSequence] = deque()  # have a row, and no slot yet
        self.prefilling: deque[GeneratedSequence] = deque()  # have tokens that are not in the cache
        self.num_running = 0  # sample a token in each decode step
        self.by_slot: dict[int, GeneratedSequence] = {}
        self.parked: dict[SequenceGroup, list[GeneratedSequence]] = {}  # outgrew their slots
        self.batch_shape: tuple[int, int, int] | None = None  # of `layout`; None when sequences came or went
        self.longest = 0  # no running sequence has more tokens in its slot

    # ---- what a caller uses

    def submit(self, groups: Sequence[SequenceGroup]) -> list[GeneratedSequence]:
        """Queue groups and make room for them. Returns sequences without room to answer; their groups will not run."""
        assert not self.by_slot, "an engine takes its groups once"
        accepted = []
        refused = []
        for group in groups:
            known = len(group.ids) + max(len(sequence.ids) for sequence in group.sequences)
            if known < self.max_tokens:
                accepted.append(group)
            else:
                refused += group.sequences
        if accepted:
            self._allocate(accepted)
        for group in accepted:
            self._queue(group, group.sequences)
        return refused

    @property
    def busy(self) -> bool:
        """Whether `step` has something to do. Sequences at a tool give it nothing to do."""
        return bool(self.prefilling or self.num_running or self._can_admit or self._can_resume)

    @property
    def _can_admit(self) -> bool:
        """Whether there is a free slot and a sequence to take it: its prompt has a row, or there is a free row."""
        has_prompt = self.waiting or (self.waiting_groups and self.cache.free_rows)
        return bool(has_prompt and self.cache.free_slots)

    @property
    def _can_resume(self) -> bool:
        """Whether only parked sequences are left. One at a tool still has its slot."""
        return bool(self.parked and not (self.by_slot or self.waiting or self.waiting_groups))

    def extend(self, sequence: GeneratedSequence, ids: list[int], images: Sequence[tuple[int, Image]] = ()) -> None:
        """Append what a tool gave; the sequence samples its next turn after it. `images`: (offset in ids, picture).

        Raises ValueError where that leaves no room for a token: finish the sequence instead.
        """
        known = len(sequence.group.ids) + len(sequence.ids) + len(ids)
        if known >= self.max_tokens:
            raise ValueError(f"{len(ids)} more tokens make {known}, which leaves no room under {self.max_tokens}")
        sequence.force(ids, images)
        if self._fits(sequence):
            self.prefilling.append(sequence)
        else:
            self.finish(sequence)  # frees its slot
            self._park(sequence)

    def finish(self, sequence: GeneratedSequence) -> None:
        """Free a sequence's slot, and with the last member of a group its row."""
        group = sequence.group
        del self.by_slot[sequence.slot]
        heappush(self.cache.free_slots, sequence.slot)
        group.members.remove(sequence)
        if not group.members:
            heappush(self.cache.free_rows, group.row)
        self.batch_shape = None

    @torch.no_grad()
    def step(self) -> list[GeneratedSequence]:
        """Admit what fits, prefill what is new, decode one token everywhere; returns sequences whose turn ended."""
        ended = []
        if self._can_resume:
            self._resume_parked()
        if self._can_admit:
            ended += self._admit()
        if self.prefilling:
            ended += self._prefill_sequences()
        if self.num_running:
            ended += self._decode()
        return ended

    # ---- admission

    def _allocate(self, groups: Sequence[SequenceGroup]) -> None:
        """Make the cache for `groups`, with short slots."""
        config = self.model.config
        dtype = next(self.model.parameters()).dtype
        prompt_lens = [len(group.ids) for group in groups]
        group_sizes = [len(group.sequences) for group in groups]
        longest = self.max_tokens - min(prompt_lens) + 1
        slots = min(self.slots, sum(group_sizes))
        room, long_slots = slot_layout(slots, self.slot_tokens, longest)
        places = max(slots * room, long_slots * longest)
        rows = prefix_rows(len(prompt_lens), slots, min(group_sizes))
        self.cache = Cache(config, rows, max(prompt_lens), places, self.device, dtype)
        self.long_layout = (long_slots, longest)
        self._divide(slots, room, max(group_sizes))

    def _divide(self, slots: int, room: int, group_size: int) -> None:
        """Divide the cache into slots, for groups of at most `group_size`."""
        self.cache.divide(slots, room)
        self.state = SlotState(slots, room, self.device)
        self.layout = DecodeLayout(self.cache.rows, slots, group_size, self.device)

    def _queue(self, group: SequenceGroup, sequences: Sequence[GeneratedSequence]) -> None:
        """Let `sequences` of a group wait for a row and slots; those that begin too long for a slot are parked."""
        group.members = []
        for sequence in sequences:
            sequence.group = group
            if self._fits(sequence):
                group.members.append(sequence)
            else:
                self._park(sequence)
        if group.members:
            self.waiting_groups.append(group)

    def _admit(self) -> list[GeneratedSequence]:
        """Give free slots to waiting sequences. Returns those whose turn ended with its first token.

        A sequence without forced tokens draws its first token from its prompt's scores. One with forced tokens has to
        prefill them first.
        """
        groups = self._next_groups()
        if groups:
            self._open_groups(groups)
        starting = []
        scores = []
        while self.cache.free_slots and self.waiting:
            sequence = self.waiting.popleft()
            sequence.slot = heappop(self.cache.free_slots)
            self.by_slot[sequence.slot] = sequence
            group = sequence.group
            if sequence.ids:
                self.prefilling.append(sequence)
            else:
                starting.append(sequence)
                scores.append(group.scores)
            if sequence is group.members[-1]:  # members are admitted in order
                group.scores = None  # a megabyte that no sequence will ask for
        self.batch_shape = None
        if not starting:
            return []
        return self._start_turns(torch.stack(scores), starting)

    def _next_groups(self) -> list[SequenceGroup]:
        """Give rows to waiting groups, in order: while slots and rows are left, one pass's worth of prompts."""
        groups: list[SequenceGroup] = []
        slots = len(self.cache.free_slots) - len(self.waiting)  # those that are left for new groups
        tokens = 0
        while self.waiting_groups and self.cache.free_rows and slots > 0:
            group = self.waiting_groups[0]
            tokens += len(group.ids)
            if groups and tokens > self.prefill_tokens:
                break
            group.row = heappop(self.cache.free_rows)
            slots -= len(group.members)
            groups.append(self.waiting_groups.popleft())
        return groups

    def _open_groups(self, groups: list[SequenceGroup]) -> None:
        """Prefill the prompts of groups, each into its row; their sequences then wait for slots."""
        scores, positions = self._prefill_prompts(groups)  # (groups, V)
        for group, group_scores, position in zip(groups, scores, positions):
            group.scores = group_scores.clone()  # (V,) a view would keep the scores of the whole pass alive
            for sequence in group.members:
                sequence.position = position
                self.waiting.append(sequence)

    # ---- slots that become too short

    def _fits(self, sequence: GeneratedSequence) -> bool:
        """Whether its slot has room for one more token."""
        return len(sequence.ids) < self.cache.room

    def _park(self, sequence: GeneratedSequence) -> None:
        """Keep a sequence that has no slot for a longer one."""
        self.parked.setdefault(sequence.group, []).append(sequence)
        self.counts["parked"] += 1

    def _resume_parked(self) -> None:
        """Divide the cache into slots for the longest conversation, and let all that is parked wait for them."""
        parked = self.parked
        self.parked = {}
        group_size = max(len(sequences) for sequences in parked.values())
        self.graphs = Graphs(self.graphs.on)  # what was captured knows the old slots
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # of the old graphs: a capture does not free what it lacks
        self._divide(*self.long_layout, group_size)
        for group, sequences in parked.items():
            for sequence in sequences:
                sequence.cached = 0
            self._queue(group, sequences)

    # ---- prefill

    def _prefill_prompts(self, groups: Sequence[SequenceGroup]) -> tuple[Tensor, list[int]]:
        """Run prompts through the model into their rows; returns scores after them (groups, V) and next positions."""
        rows: list[int] = []  # (N,) the row that each packed token's keys go to
        places: list[int] = []  # (N,) and where in it
        for group in groups:
            rows += [group.row] * len(group.ids)
            places += range(len(group.ids))
        row_index = torch.tensor(rows, device=self.device)  # (N,)
        place_index = torch.tensor(places, device=self.device)  # (N,)
        packed = Packed([len(group.ids) for group in groups], self.device)

        def attention_fn(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            prefix_k, prefix_v = self.cache.prefix[layer]  # (R, P, K, D)
            prefix_k[row_index, place_index] = k
            prefix_v[row_index, place_index] = v
            return packed(layer, q, k, v)

        prompts = [NewTokens(group.ids, group.images, position=0) for group in groups]
        return self._forward(prompts, attention_fn)

    def _prefill_sequences(self) -> list[GeneratedSequence]:
        """Prefill the new tokens of prefilling sequences: each sees its prompt, its own past, and the new tokens.

        Then their next turns start. Returns those whose turn ended with its first token.
        """
        sequences = self._next_to_prefill()
        slots: list[int] = []  # (N,) the slot that each new token's keys go to
        places: list[int] = []  # (N,) and where in it
        q_lens: list[int] = []  # new tokens of each sequence
        k_lens: list[int] = []  # tokens that the last of them sees: the prompt and all of the sequence
        for sequence in sequences:
            new = range(sequence.cached, len(sequence.ids))
            slots += [sequence.slot] * len(new)
            places += new
            q_lens.append(len(new))
            k_lens.append(len(sequence.group.ids) + len(sequence.ids))
        slot_index = torch.tensor(slots, device=self.device)  # (N,)
        place_index = torch.tensor(places, device=self.device)  # (N,)
        segments = Segments.of(q_lens, k_lens, True, self.device)

        def attention_fn(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            suffix_k, suffix_v = self.cache.suffix[layer]  # (S, L, K, D)
            suffix_k[slot_index, place_index] = k
            suffix_v[slot_index, place_index] = v
            return packed_attention(q, *self._cached_keys(layer, sequences), segments)

        new_tokens = [_new_tokens(sequence) for sequence in sequences]
        scores, positions = self._forward(new_tokens, attention_fn)  # (sequences, V)
        for sequence, position in zip(sequences, positions):
            sequence.cached = len(sequence.ids)
            sequence.position = position
        return self._start_turns(scores, sequences)

    def _cached_keys(self, layer: int, sequences: Sequence[GeneratedSequence]) -> tuple[Tensor, Tensor]:
        """Keys and values (M, K, D) of `sequences`, packed: for each those of its prompt, then its own."""
        prefix_k, prefix_v = self.cache.prefix[layer]  # (R, P, K, D)
        suffix_k, suffix_v = self.cache.suffix[layer]  # (S, L, K, D)
        keys = []
        values = []
        for sequence in sequences:
            row = sequence.group.row
            slot = sequence.slot
            prompt_len = len(sequence.group.ids)
            own_len = len(sequence.ids)
            keys += [prefix_k[row, :prompt_len], suffix_k[slot, :own_len]]
            values += [prefix_v[row, :prompt_len], suffix_v[slot, :own_len]]
        return torch.cat(keys), torch.cat(values)

    def _next_to_prefill(self) -> list[GeneratedSequence]:
        """Take as many prefilling sequences, in order, as one pass may hold; at least one."""
        sequences: list[GeneratedSequence] = []
        tokens = 0
        while self.prefilling:
            sequence = self.prefilling[0]
            tokens += len(sequence.ids) - sequence.cached
            if sequences and tokens > self.prefill_tokens:
                break
            sequences.append(self.prefilling.popleft())
        return sequences

    def _forward(self, pieces: Sequence[NewTokens], attention_fn: AttentionFn) -> tuple[Tensor, list[int]]:
        """Forward packed `pieces`: scores after the last token of each (pieces, V), and the next position of each."""
        ids: list[int] = []  # (N,)
        position_ids: list[Tensor] = []  # (3, tokens) of each piece
        next_positions: list[int] = []
        last: list[int] = []  # index of each piece's last token
        images: list[Image] = []
        image_index: list[Tensor] = []  # where each image's tokens are
        for piece in pieces:
            grids = []
            for offset, image in piece.images:
                first = len(ids) + offset
                images.append(image)
                image_index.append(torch.arange(first, first + image.tokens))
                grids.append((offset, image.grid))
            positions, next_position = mrope_positions(len(piece.ids), grids, piece.position)
            position_ids.append(positions)
            next_positions.append(next_position)
            ids += piece.ids
            last.append(len(ids) - 1)
        self.counts["prefilled"] += len(ids)
        scores = self.model(
            torch.tensor(ids, device=self.device),
            torch.cat(position_ids, 1).to(self.device),
            attention_fn,
            image_features=self._encode(images),
            image_index=torch.cat(image_index).to(self.device) if images else None,
            head_fn=lambda hidden, head: self._scores(hidden[last], head),
        )
        return scores, next_positions

    def _scores(self, hidden: Tensor, head: Tensor) -> Tensor:
        """Logits (n, V) over the temperature, of hidden states (n, d)."""
        return logits(hidden, head, self.temperature, self.suppressed)

    def _encode(self, images: Sequence[Image]) -> Tensor | None:
        """Features (I, d) of `images` in order; each distinct one goes through the tower once in the engine's life."""
        if not images:
            return None
        new = {image.key: image for image in images if image.key not in self.features}
        if new:
            encoded = self.model.encode_images(list(new.values()))
            sizes = [image.tokens for image in new.values()]
            for key, features in zip(new, encoded.split(sizes)):
                self.features[key] = features
            self.counts["images_encoded"] += len(new)
        return torch.cat([self.features[image.key] for image in images])

    # ---- decoding

    def _start_turns(self, scores: Tensor, sequences: Sequence[GeneratedSequence]) -> list[GeneratedSequence]:
        """Make sequences running: sample the next token from `scores` (sequences, V), mostly the first of a turn.

        Returns those whose turn ended with it.
        """

        def to_device(values: list[int]) -> Tensor:
            return torch.tensor(values, device=self.device)

        for sequence in sequences:
            if sequence.limit is None:  # a turn begins; one that was parked continues
                sequence.limit = self._turn_limit(sequence)
        state = self.state
        slots = to_device([sequence.slot for sequence in sequences])
        state.length[slots] = to_device([sequence.cached for sequence in sequences])
        state.position[slots] = to_device([sequence.position for sequence in sequences])
        state.key[slots] = to_device([sequence.key for sequence in sequences])
        state.limit[slots] = to_device([min(sequence.limit, self.cache.room) for sequence in sequences])
        state.running[slots] = True
        for sequence in sequences:
            sequence.start = len(sequence.ids)
            sequence.start_step = self.counts["decode_steps"]
        self.num_running += len(sequences)
        self.batch_shape = None
        over = self._draw(scores, slots)  # (n,) bool
        return self._end_turns(slots, over)

    def _turn_limit(self, sequence: GeneratedSequence) -> int:
        """How many tokens a sequence may have after its prompt when the turn that begins is over."""
        of_turn = len(sequence.ids) + self.turn_tokens
        of_conversation = self.max_tokens - len(sequence.group.ids)
        return min(of_turn, of_conversation)

    def _decode(self) -> list[GeneratedSequence]:
        """Feed every slot its last token and sample the next of each running sequence. Returns whose turn ended."""
        if self.batch_shape is None:  # sequences came or went
            if self._mostly_empty():
                self._compact()
            self.batch_shape = self._choose_batch_shape()
            self.layout.write(self.by_slot, *self.batch_shape)
            # Free slots are computed with the others, and their results are dropped. At length 0 such a slot reads one
            # key of its own and not all that its last sequence left there.
            self.state.length[self.cache.free_slots] = 0
            self.longest = self._most_cached()
        self.longest += 1
        self.counts["decode_steps"] += 1
        shape = (*self.batch_shape, self._keys_to_read())
        over = self.graphs(shape, partial(self.decode_step, *shape))  # (S,) bool
        slots = torch.arange(len(over), device=self.device)  # (S,)
        return self._end_turns(slots, over)

    def decode_step(self, num_slots: int, num_rows: int, group_size: int, num_keys: int) -> Tensor:
        """One step of the slots [0, num_slots) with prompts in the rows [0, num_rows): whose turn is over, (S,) bool.

        `num_keys`: no slot has more tokens, the new one included. A CUDA graph may replay this: it depends on no other
        number of the host, all that it reads or writes stays where it is, and it never waits.
        """
        state = self.state
        slots = torch.arange(num_slots, device=self.device)  # (S,)
        length = state.length[:num_slots].clone()  # (S,)
        cached = self.layout.cached(num_slots, num_rows, group_size, suffix_lens=length + 1)

        def attention_fn(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            prefix_k, prefix_v = self.cache.prefix[layer]  # (R, P, K, D)
            suffix_k, suffix_v = self.cache.suffix[layer]  # (S, L, K, D)
            # Every slot writes, also if its sequence is at a tool. It writes behind its tokens, where the next one
            # belongs, and that place is overwritten when the sequence continues. A slot whose sequence is still to be
            # prefilled writes where its last sequence ended: that place too is written again before it is read.
            suffix_k[slots, length] = k
            suffix_v[slots, length] = v
            prefix = (prefix_k[:num_rows], prefix_v[:num_rows])
            suffix = (suffix_k[:num_slots, :num_keys], suffix_v[:num_slots, :num_keys])
            return cached(q, prefix, suffix)

        token = state.token[:num_slots]  # (S,)
        position = state.position[:num_slots].expand(3, num_slots)  # (3, S): of text, all three are the same
        scores = self.model(token, position, attention_fn, head_fn=self._scores)  # (S, V)
        state.length[:num_slots] += state.running[:num_slots]
        state.position[:num_slots] += state.running[:num_slots]
        return self._draw(scores, slots)

    def _draw(self, scores: Tensor, slots: Tensor) -> Tensor:
        """Sample one token per slot (n,) from `scores` (n, V) and record it; whose turn is over, (n,) bool."""
        state = self.state
        index = state.length[slots]  # (n,) of the new token after the prompt: it is not in the cache yet
        noise = uniform(state.key[slots], index)  # (n,)
        tokens, logps = sample(scores, noise, self.greedy)  # (n,)
        state.ids[slots, index] = tokens
        state.logps[slots, index] = logps
        state.token[slots] = tokens
        full = index + 1 >= state.limit[slots]  # (n,)
        return state.running[slots] & ((tokens == self.stop_id) | full)

    # ---- the ends of turns

    def _end_turns(self, slots: Tensor, over: Tensor) -> list[GeneratedSequence]:
        """The sequences of those `slots` (n,) that are `over` (n,) bool, with the tokens of their turns.

        The host waits here to know how many they are, and if there are any, for their numbers and log-probabilities.
        """
        ended = slots[over]  # (E,)
        if not len(ended):
            return []
        self.state.running[ended] = False
        self.num_running -= len(ended)
        numbers, logps = self._turns_of(ended)
        with_turn_over = []
        for its_numbers, its_logps in zip(numbers.cpu(), logps.cpu()):
            sequence = self._take_sampled(its_numbers, its_logps)
            if sequence.limit is None:
                with_turn_over.append(sequence)
            else:  # only its slot is full
                self.finish(sequence)
                self._park(sequence)
        return with_turn_over

    def _turns_of(self, ended: Tensor) -> tuple[Tensor, Tensor]:
        """What the host wants to know of slots `ended` (E,), still on the device.

        Integers (E, 3 + L): slot, length, next position, and all sampled ids; and their log-probabilities (E, L). All
        integers are in one tensor, because the host waits for each copy.
        """
        state = self.state
        header = torch.stack([ended, state.length[ended], state.position[ended]], 1)  # (E, 3)
        numbers = torch.cat([header, state.ids[ended]], 1)  # (E, 3 + L)
        return numbers, state.logps[ended]

    def _take_sampled(self, numbers: Tensor, logps: Tensor) -> GeneratedSequence:
        """Append what was sampled to its sequence, which is returned. If the turn is over, it has no `limit` any more.

        `numbers` (3 + L,), `logps` (L,): see `_turns_of`.
        """
        slot, length, position = numbers[:3].tolist()
        ids = numbers[3:]  # (L,)
        sequence = self.by_slot[slot]
        start = sequence.start
        end = length + 1  # the last token was sampled and not fed, so it is not in the cache
        sequence.ids += ids[start:end].tolist()
        sequence.logps += logps[start:end].tolist()
        sequence.loss_mask += [1] * (end - start)
        sequence.cached = length
        sequence.position = position
        sequence.start_step = None
        sequence.stopped = sequence.ids[-1] == self.stop_id
        if sequence.stopped or end >= sequence.limit:
            sequence.limit = None
        return sequence

    # ---- the shape of a batch

    def _choose_batch_shape(self) -> tuple[int, int, int]:
        """Slots, rows, and sequences of a row that the next steps are computed with: those in use, up to the last.

        Where steps are captured, larger numbers that seldom change.
        """
        slots = max(self.by_slot) + 1
        if self.graphs.on:
            all_slots = len(self.state.token)
            all_rows = len(self.layout.prefix_lens)
            return self.graphs.bucket(slots, all_slots), all_rows, self.layout.largest_group
        groups = [sequence.group for sequence in self.by_slot.values()]
        rows = max(group.row for group in groups) + 1
        group_size = max(Counter(groups).values())
        return slots, rows, group_size

    def _keys_to_read(self) -> int:
        """How many places of each slot a step reads: all if the kernel knows every length, else up to the longest."""
        if self.cache.kernel:
            return self.cache.room
        return self.graphs.bucket(self.longest, self.cache.room, least=64)

    def _most_cached(self) -> int:
        """The most tokens that a sequence has in its slot now. The host counts along, so it need not ask the device."""
        most = 0
        for sequence in self.by_slot.values():
            cached = sequence.cached
            if sequence.start_step is not None:
                cached += self.counts["decode_steps"] - sequence.start_step  # one each step
            most = max(most, cached)
        return most

    def _mostly_empty(self) -> bool:
        """Whether half of the slots up to the last one in use are empty, and no sequence waits to fill them."""
        return 2 * len(self.by_slot) <= max(self.by_slot) and not self.waiting

    def _compact(self) -> None:
        """Move the few occupied slots and rows to the front, so that a batch's last sequences make small steps."""
        slots = sorted(self.by_slot)
        sequences = [self.by_slot[slot] for slot in slots]
        groups = list(dict.fromkeys(sequence.group for sequence in sequences))  # in order, each once
        rows = [group.row for group in groups]
        used = max(len(sequence.ids) for sequence in sequences) + self.turn_tokens  # places of a slot, at most
        for keys, values in self.cache.prefix:
            keys[: len(rows)] = keys[rows]
            values[: len(rows)] = values[rows]
        for keys, values in self.cache.suffix:
            keys[: len(slots), :used] = keys[slots, :used]
            values[: len(slots), :used] = values[slots, :used]
        self.state.move_to_front(slots)
        for row, group in enumerate(groups):
            group.row = row
        self.by_slot = {}
        for slot, sequence in enumerate(sequences):
            sequence.slot = slot
            self.by_slot[slot] = sequence
        self.cache.free_slots = list(range(len(slots), len(self.state.token)))
        self.cache.free_rows = list(range(len(rows), len(self.layout.prefix_lens)))


def _new_tokens(sequence: GeneratedSequence) -> NewTokens:
    """The tokens of a sequence that are not in the cache, and the images among them."""
    first = sequence.cached
    images = [(offset - first, image) for offset, image in sequence.images if offset >= first]
    return NewTokens(sequence.ids[first:], images, sequence.position)
