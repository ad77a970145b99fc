"""Generation: batched sampling over a KV cache, for groups of conversations that stop, wait for a tool and go on.

A *group* is one prompt with several sequences. Its prompt and image are prefilled once into a **prefix row**; each sequence
takes a **slot** that holds the keys and values of its own tokens. A turn ends at the stop token or its token limit; the
caller then either finishes the sequence or extends it with what a tool gave, and only those new tokens are prefilled. The
other sequences decode on meanwhile: there is no barrier between turns.

Sequences are admitted one by one: a freed slot is taken at once by the next sequence, of a group whose prompt is already in
its row, or of the next group in the queue. A row is free again when the last sequence of its group has finished, so there
are more rows than whole groups fit into the slots: otherwise every group's slowest sequence would keep slots empty.

All that changes per token lives in tensors on the device. The host waits for it once a decode step, to see whose turn
is over, and does no work per token; on CUDA it launches the step as one graph (graphs.py).

Sampling is a pure function of (seed key, token index): inverse CDF of a counter-based uniform, no generator, no state.
Shape letters: S slots, R prefix rows, G sequences, K key/value heads, P prompt room, L suffix room, D head size,
V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections import Counter, deque
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any, Sequence

import torch
from torch import Tensor

from mmsr import attention
from mmsr.attention import Cached, Packed, Segments, packed_attention
from mmsr.model import ModelConfig, Qwen2_5_VL, logits, mrope_positions
from mmsr.system.fuse import fused
from mmsr.system.graphs import Graphs


@dataclass(eq=False)
class GeneratedSequence:
    """One conversation being generated. `ids` is everything after the prompt; the three lists are aligned.

    A sequence may open with forced tokens in `ids` (log-probability and mask 0).
    """

    key: int  # seeds its randomness; see `sampling_key`
    ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)  # 0 where a token was forced
    loss_mask: list[int] = field(default_factory=list)  # 1 where it was sampled
    images: list[tuple[int, Any]] = field(default_factory=list)  # (offset within ids, vision.Image)
    stopped: bool = False  # the last turn ended with the stop token, not out of room
    start: int = 0  # where in `ids` the tokens of the last sampled turn begin
    cached: int = 0  # how many of `ids` have keys and values
    since: int | None = None  # the engine's count of decode steps when the turn under way began
    position: int = 0  # rotary position of the first token that has none
    slot: int = -1
    group: SequenceGroup | None = None

    def force(self, ids: list[int], images: Sequence[tuple[int, Any]] = ()) -> None:
        """Append tokens that are given, not sampled. `images`: (offset within these tokens, vision.Image)."""
        self.images += [(len(self.ids) + at, image) for at, image in images]
        self.ids += ids
        self.logps += [0.0] * len(ids)
        self.loss_mask += [0] * len(ids)


@dataclass(eq=False)
class SequenceGroup:
    """A prompt and the sequences that share it."""

    ids: list[int]
    images: list[tuple[int, Any]]
    sequences: list[GeneratedSequence]
    row: int = -1
    unfinished: int = 0
    scores: Tensor | None = None  # (V,) after the prompt: every sequence's first token is drawn from them


def sampling_key(*parts: object) -> int:
    """64 bits from (seed, step, group, sample, …): equal parts give equal samples, whatever else is in the batch."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def uniform(key: Tensor, index: Tensor) -> Tensor:
    """Counter-based uniforms in [0, 1), float64: the splitmix64 finaliser over key + index · golden ratio."""

    def shift(x: Tensor, bits: int) -> Tensor:  # logical, int64 has only the arithmetic one
        return (x >> bits) & ((1 << (64 - bits)) - 1)

    x = key + (index + 1) * -7046029254386353131
    x = (x ^ shift(x, 30)) * -4658895280553007687
    x = (x ^ shift(x, 27)) * -7723592293110705685
    return shift(x ^ shift(x, 31), 11).double() * 2.0**-53


@fused
def probabilities(logps: Tensor) -> Tensor:
    return logps.double().exp()


def sample(scores: Tensor, noise: Tensor, greedy: bool) -> tuple[Tensor, Tensor]:
    """Token ids and their log-probabilities (n,) under softmax(`scores` (n, V)), by inverse CDF of `noise` (n,)."""
    logps = scores.log_softmax(-1)
    if greedy:
        tokens = scores.argmax(-1)
    else:
        mass = probabilities(logps).cumsum(-1)
        tokens = torch.searchsorted(mass, (noise * mass[:, -1])[:, None], right=True)[:, 0]
        tokens = tokens.clamp_(max=scores.shape[1] - 1)
    return tokens, logps.gather(1, tokens[:, None])[:, 0]


def prefix_rows(prompts: int, slots: int, sequences: int) -> int:
    """How many prompts the cache holds at once, for `slots` conversations in groups of at least `sequences`.

    Twice as many as fill the slots, and one: a group's slowest sequences keep its row while the next groups already run.
    On recorded lengths that keeps the slots full (tests/test_occupancy.py). A row in use has at least one slot.
    """
    return min(prompts, slots, 2 * math.ceil(slots / sequences) + 1)


class Cache:
    """Keys and values of every layer: prefix rows (R, P, K, D) and suffix slots (S, L, K, D).

    It has its full size from the beginning: CUDA graphs know its addresses, and what does not fit should fail at once
    and not hours into a run. Zeros, because attention multiplies what lies beyond a sequence by 0, and 0 · NaN is NaN.
    """

    def __init__(self, config: ModelConfig, rows: int, prompt_room: int, slots: int, room: int, device, dtype):
        def store(n: int, length: int) -> Tensor:
            sizes = [n, length, config.num_key_value_heads, config.head_dim]
            if attention.has_decode_kernel(torch.empty(0, device=device, dtype=dtype)):
                return torch.zeros(sizes, device=device, dtype=dtype)
            sizes[1], sizes[2] = sizes[2], sizes[1]  # plain products are faster with each head's keys in one piece
            return torch.zeros(sizes, device=device, dtype=dtype).transpose(1, 2)

        layers = range(config.num_hidden_layers)
        self.prefix = [(store(rows, prompt_room), store(rows, prompt_room)) for _ in layers]
        self.suffix = [(store(slots, room), store(slots, room)) for _ in layers]


class Engine:
    """Generates for `model`: `submit` groups once, then `step` while `busy`; finish or extend what it returns."""

    def __init__(
        self,
        model: Qwen2_5_VL,
        stop_id: int,
        suppressed: Tensor,  # (V,) bool: ids that may not be sampled
        *,
        slots: int,
        max_tokens: int,
        turn_tokens: int,
        temperature: float = 1.0,
        prefill_tokens: int = 16384,
        capture: bool = True,
    ):
        """`max_tokens` bounds a conversation with its prompt, `turn_tokens` what is sampled in one turn.

        `temperature` 0 is greedy, with log-probabilities at 1. `prefill_tokens` bounds one pass over new prompts.
        `capture`: on CUDA, replay decode steps from graphs. The model's weights may not move while the engine lives.
        """
        self.model, self.stop_id, self.suppressed, self.device = model, stop_id, suppressed, suppressed.device
        self.slots, self.max_tokens, self.turn_tokens = slots, max_tokens, turn_tokens
        self.greedy, self.temperature = temperature == 0, temperature or 1.0
        self.prefill_tokens = prefill_tokens
        self.graphs = Graphs(capture and self.device.type == "cuda")
        self.queue: deque[SequenceGroup] = deque()  # have no row yet
        self.unseated: deque[GeneratedSequence] = deque()  # have a row, and wait for a slot
        self.feeding: list[GeneratedSequence] = []  # have forced tokens to prefill
        self.live_members = 0  # are decoding
        self.seated: dict[int, GeneratedSequence] = {}  # by slot; includes those that wait for a tool
        self.counts: Counter = Counter()  # prefilled, decode_steps, images_encoded
        self.features: dict[str, Tensor] = {}  # encoded images, by content: weights stand still while an engine lives

    # ---- what a caller uses -----------------------------------------------------------------------------------------

    def submit(self, groups: Sequence[SequenceGroup]) -> list[GeneratedSequence]:
        """Queue groups and make room for them. Returns sequences without room to answer; their groups will not run."""
        assert not self.seated, "an engine takes its groups once"
        refused = []
        for group in groups:
            known = len(group.ids) + max(len(sequence.ids) for sequence in group.sequences)
            if known < self.max_tokens:
                self.queue.append(group)
            else:
                refused += group.sequences
        if self.queue:
            self._make_room()
        return refused

    @property
    def busy(self) -> bool:
        """Whether `step` has something to do (sequences that wait for a tool are not its business)."""
        return bool(self.feeding or self.live_members or self._can_seat)

    @property
    def _can_seat(self) -> bool:
        """Whether there is a free slot and a sequence to take it: its prompt has a row, or there is a free row."""
        return bool((self.unseated or (self.queue and self.free_rows)) and self.free_slots)

    def extend(self, sequence: GeneratedSequence, ids: list[int], images: Sequence[tuple[int, Any]] = ()) -> None:
        """Give a waiting sequence what came back; it samples its next turn after it. `images`: (offset in ids, Image).

        Raises ValueError where that leaves no room for a token: finish the sequence instead.
        """
        known = len(sequence.group.ids) + len(sequence.ids) + len(ids)
        if known >= self.max_tokens:
            raise ValueError(f"{len(ids)} more tokens make {known}, which leaves no room under {self.max_tokens}")
        sequence.force(ids, images)
        self.feeding.append(sequence)

    def finish(self, sequence: GeneratedSequence) -> None:
        """Give a sequence's slot back, and the prefix row with the last of its group."""
        self.free_slots.append(sequence.slot)
        del self.seated[sequence.slot]
        sequence.group.unfinished -= 1
        if not sequence.group.unfinished:
            self.free_rows.append(sequence.group.row)
        self.layout = None

    @torch.no_grad()
    def step(self) -> list[GeneratedSequence]:
        """Admit what fits, prefill what is new, decode one token everywhere; returns sequences whose turn ended."""
        ended = []
        if self._can_seat:
            ended += self._admit()
        if self.feeding:
            ended += self._feed()
        if self.live_members:
            ended += self._decode()
        return ended

    # ---- room -------------------------------------------------------------------------------------------------------

    def _make_room(self) -> None:
        """Size cache and slot state to what is queued."""
        prompts = [len(group.ids) for group in self.queue]
        sizes = [len(group.sequences) for group in self.queue]
        slots = min(self.slots, sum(sizes))
        rows = prefix_rows(len(prompts), slots, min(sizes))
        self.room = self.max_tokens - min(prompts) + 1
        config, dtype = self.model.config, next(self.model.parameters()).dtype
        self.cache = Cache(config, rows, max(prompts), slots, self.room, self.device, dtype)
        self.free_slots, self.free_rows = list(range(slots)), list(range(rows))
        self.layout = None

        def state(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=self.device)

        self.token = state(torch.long, slots)  # fed next
        self.length = state(torch.long, slots)  # tokens cached
        self.position = state(torch.long, slots)  # rotary position of the token that is fed next
        self.key = state(torch.long, slots)
        self.limit = state(torch.long, slots)  # length at which the turn ends
        self.live = state(torch.bool, slots)
        self.ids = state(torch.long, slots, self.room)  # what was sampled, by place behind the prompt
        self.logps = state(torch.float32, slots, self.room)
        self.most_members = max(sizes)  # of a row
        self.prefix_lens = state(torch.long, rows)
        self.sequences = state(torch.long, rows * self.most_members)
        self.place = state(torch.long, slots)

    def _admit(self) -> list[GeneratedSequence]:
        """Seat sequences while there are free slots. Returns those whose turn ended with its first token.

        A sequence without an opening draws its first token from its prompt's scores; one with an opening is fed that.
        """
        groups = self._next_groups()
        if groups:
            self._open(groups)
        seated = [self._seat(self.unseated.popleft()) for _ in range(min(len(self.free_slots), len(self.unseated)))]
        self.layout = None
        starting = [sequence for sequence in seated if not sequence.ids]
        self.feeding += [sequence for sequence in seated if sequence.ids]
        scores = [sequence.group.scores for sequence in starting]
        for group in {sequence.group for sequence in seated}:
            if not self.unseated or self.unseated[0].group is not group:
                group.scores = None  # a megabyte that nobody will ask for
        return self._start(torch.stack(scores), starting) if starting else []

    def _next_groups(self) -> list[SequenceGroup]:
        """The queued groups to prefill now, in order: while slots and rows are left, one pass's worth of prompts."""
        groups: list[SequenceGroup] = []
        slots, tokens = len(self.free_slots) - len(self.unseated), 0
        for group in self.queue:
            tokens += len(group.ids)
            if slots <= 0 or len(groups) == len(self.free_rows) or (groups and tokens > self.prefill_tokens):
                break
            groups.append(group)
            slots -= len(group.sequences)
        return groups

    def _open(self, groups: list[SequenceGroup]) -> None:
        """Prefill the prompts in one packed pass, each into a row; their sequences may then take slots."""
        self.free_rows.sort()
        for group in groups:
            self.queue.popleft()
            group.row, group.unfinished = self.free_rows.pop(0), len(group.sequences)
        scores, positions = self._prefill_prompts(groups)
        for group, after, position in zip(groups, scores, positions):
            group.scores = after.clone()  # not a part of the whole pass's, which would stay as long
            for sequence in group.sequences:
                sequence.group, sequence.position = group, position
                self.unseated.append(sequence)

    def _seat(self, sequence: GeneratedSequence) -> GeneratedSequence:
        """Give a sequence the first free slot."""
        self.free_slots.sort()
        sequence.slot = self.free_slots.pop(0)
        self.seated[sequence.slot] = sequence
        return sequence

    def _lay_out(self) -> tuple[int, int, int]:
        """Write down for decoding who sits where; needed only when somebody came or went.

        That is `prefix_lens` (R,), `sequences` (R · G,) and `place` (S,), see `attention.Cached`. Returns the S, R and G
        to decode with: the slots and rows in use, counted to the last, and the most sequences of a row; where steps are
        captured, larger numbers that seldom change.
        """
        slots = sorted(self.seated)
        if 2 * len(slots) <= slots[-1] and not self.unseated:
            self._compact(slots)
        here: dict[SequenceGroup, list[int]] = {}  # the slots of each group's sequences
        for sequence in self.seated.values():
            here.setdefault(sequence.group, []).append(sequence.slot)
        n, rows, width = self._sizes(here)
        prefix_lens = torch.zeros(rows, dtype=torch.long)
        sequences = torch.zeros(rows, width, dtype=torch.long)
        place = torch.full((n,), next(iter(here)).row * width)  # an empty slot looks at a prompt that is there
        for group, seats in here.items():
            prefix_lens[group.row] = len(group.ids)
            sequences[group.row, : len(seats)] = torch.tensor(seats)
            place[seats] = group.row * width + torch.arange(len(seats))
        self.prefix_lens[:rows] = prefix_lens.to(self.device)
        self.sequences[: rows * width] = sequences.flatten().to(self.device)
        self.place[:n] = place.to(self.device)
        self.length[self.free_slots] = 0
        now = self.counts["decode_steps"]
        cached = (m.cached + (0 if m.since is None else now - m.since) for m in self.seated.values())
        self.reach = max(cached)  # no slot has more tokens cached than this
        return n, rows, width

    def _sizes(self, here: dict[SequenceGroup, list[int]]) -> tuple[int, int, int]:
        """Slots, rows and sequences of a row that the next steps are run with."""
        slots = max(self.seated) + 1
        if self.graphs.on:
            return self.graphs.bucket(slots, len(self.token)), len(self.prefix_lens), self.most_members
        return slots, max(group.row for group in here) + 1, max(map(len, here.values()))

    def _compact(self, slots: list[int]) -> None:
        """Move the few occupied slots and rows to the front, so that the tail of a batch does not pay for its head."""
        groups = list(dict.fromkeys(self.seated[slot].group for slot in slots))
        rows = [group.row for group in groups]
        used = max(len(sequence.ids) for sequence in self.seated.values()) + self.turn_tokens
        for layer_prefix, layer_suffix in zip(self.cache.prefix, self.cache.suffix):
            for store in layer_prefix:
                store[: len(rows)] = store[rows]
            for store in layer_suffix:
                store[: len(slots), :used] = store[slots, :used]
        for state in (self.token, self.length, self.position, self.key, self.limit, self.live, self.ids, self.logps):
            state[: len(slots)] = state[slots]
        self.live[len(slots) :] = False
        for row, group in enumerate(groups):
            group.row = row
        self.seated = {place: self.seated[slot] for place, slot in enumerate(slots)}
        for slot, sequence in self.seated.items():
            sequence.slot = slot
        self.free_slots = list(range(len(slots), len(self.token)))
        self.free_rows = list(range(len(rows), len(self.prefix_lens)))

    # ---- passes -----------------------------------------------------------------------------------------------------

    def _prefill_prompts(self, groups: Sequence[SequenceGroup]) -> tuple[Tensor, list[int]]:
        """Run prompts through the model into their rows; returns scores after them (groups, V) and next positions."""
        at = _ragged([group.row for group in groups], [(0, len(group.ids)) for group in groups], self.device)
        packed = Packed([len(group.ids) for group in groups], self.device)

        def attention_fn(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            for store, new in zip(self.cache.prefix[layer], (k, v)):
                store[at] = new
            return packed(layer, q, k, v)

        return self._forward([(group.ids, group.images, 0) for group in groups], attention_fn)

    def _feed(self) -> list[GeneratedSequence]:
        """Prefill the forced tokens of waiting sequences: each sees its prompt, its own past, and the new tokens."""
        sequences = self._next_to_feed()
        slots, prompts = [m.slot for m in sequences], [len(m.group.ids) for m in sequences]
        total = [len(m.ids) for m in sequences]
        prefix_at = _ragged([m.group.row for m in sequences], [(0, n) for n in prompts], self.device)
        suffix_at = _ragged(slots, [(0, n) for n in total], self.device)
        new_at = _ragged(slots, [(m.cached, n) for m, n in zip(sequences, total)], self.device)
        order = _alternate(prompts, total, self.device)
        news = [n - m.cached for m, n in zip(sequences, total)]
        segments = Segments.of(news, [p + n for p, n in zip(prompts, total)], True, self.device)

        def attention_fn(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            seen = []
            for prefix, suffix, new in zip(self.cache.prefix[layer], self.cache.suffix[layer], (k, v)):
                suffix[new_at] = new
                seen.append(torch.cat([prefix[prefix_at], suffix[suffix_at]])[order])
            return packed_attention(q, *seen, segments)

        pieces = [(m.ids[m.cached :], _after(m.cached, m.images), m.position) for m in sequences]
        scores, positions = self._forward(pieces, attention_fn)
        for sequence, position in zip(sequences, positions):
            sequence.cached, sequence.position = len(sequence.ids), position
        return self._start(scores, sequences)

    def _next_to_feed(self) -> list[GeneratedSequence]:
        """As many waiting sequences, in order, as one prefill pass may hold; at least one."""
        tokens = list(accumulate(len(sequence.ids) - sequence.cached for sequence in self.feeding))
        n = max(1, bisect_right(tokens, self.prefill_tokens))
        sequences, self.feeding = self.feeding[:n], self.feeding[n:]
        return sequences

    def _forward(self, pieces: Sequence[tuple[list[int], list, int]], attention_fn) -> tuple[Tensor, list[int]]:
        """Forward packed `pieces` (ids, images, first position): scores after each (pieces, V) and next positions."""
        ids, positions, ends, last, images, index = [], [], [], [], [], []
        for piece, pictures, start in pieces:
            for at, image in pictures:
                images.append(image)
                index.append(torch.arange(len(ids) + at, len(ids) + at + image.tokens))
            spans = [(at, image.grid) for at, image in pictures]
            where, end = mrope_positions(len(piece), spans, start)
            positions.append(where), ends.append(end)
            ids += piece
            last.append(len(ids) - 1)
        self.counts["prefilled"] += len(ids)
        scores = self.model(
            torch.tensor(ids, device=self.device),
            torch.cat(positions, 1).to(self.device),
            attention_fn,
            self._encode(images),
            torch.cat(index).to(self.device) if index else None,
            head_fn=lambda hidden, head: self._scores(hidden[last], head),
        )
        return scores, ends

    def _scores(self, hidden: Tensor, head: Tensor) -> Tensor:
        return logits(hidden, head, self.temperature, self.suppressed)

    def _encode(self, images: Sequence) -> Tensor | None:
        """Features of `images` in order; each distinct one goes through the tower once in the engine's life."""
        new = {image.key: image for image in images if image.key not in self.features}
        if new:
            encoded = self.model.encode_images(list(new.values()))
            self.features.update(zip(new, encoded.split([image.tokens for image in new.values()])))
            self.counts["images_encoded"] += len(new)
        return torch.cat([self.features[image.key] for image in images]) if images else None

    def _start(self, scores: Tensor, sequences: Sequence[GeneratedSequence]) -> list[GeneratedSequence]:
        """Begin a turn: sample its first token from `scores` (sequences, V)."""
        slots = torch.tensor([m.slot for m in sequences], device=self.device)
        for state, values in (
            (self.length, [m.cached for m in sequences]),
            (self.position, [m.position for m in sequences]),
            (self.key, [m.key for m in sequences]),
            (self.limit, [self._limit(m) for m in sequences]),
        ):
            state[slots] = torch.tensor(values, device=self.device)
        for sequence in sequences:
            sequence.start, sequence.since = len(sequence.ids), self.counts["decode_steps"]
        self.live[slots] = True
        self.live_members += len(sequences)
        self.layout = None
        return self._end_turns(slots, self._draw(scores, slots))

    def _limit(self, sequence: GeneratedSequence) -> int:
        """How many tokens a sequence may have behind its prompt when the turn that begins is over."""
        return min(len(sequence.ids) + self.turn_tokens, self.max_tokens - len(sequence.group.ids))

    def _decode(self) -> list[GeneratedSequence]:
        """Feed every slot its last token and sample the next where a sequence is live."""
        if self.layout is None:
            self.layout = self._lay_out()
        self.reach += 1
        self.counts["decode_steps"] += 1
        shape = (*self.layout, self._keys_read())
        over = self.graphs(shape, partial(self._one, *shape))
        return self._end_turns(torch.arange(shape[0], device=self.device), over)

    def _keys_read(self) -> int:
        """How many places of the suffix slots a step looks at: a kernel that is told each slot's length, at all."""
        if attention.has_decode_kernel(self.cache.suffix[0][0]):
            return self.room
        return self.graphs.bucket(self.reach, self.room, least=64)

    def _one(self, n: int, rows: int, width: int, reach: int) -> Tensor:
        """The pass of a decode step, for slots [0, n) with up to `reach` tokens: whose turn is over (n,) bool."""
        every, length = torch.arange(n, device=self.device), self.length[:n].clone()
        cached = Cached(
            prefix_lens=self.prefix_lens[:rows],
            group_slots=self.sequences[: rows * width].view(rows, width),
            slot_mapping=self.place[:n],
            suffix_lens=length + 1,
        )

        def attention_fn(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            prefix_k, prefix_v = self.cache.prefix[layer]
            suffix_k, suffix_v = self.cache.suffix[layer]
            # A waiting slot writes to its next place, which is overwritten when it goes on.
            suffix_k[every, length] = k
            suffix_v[every, length] = v
            return cached(q, (prefix_k[:rows], prefix_v[:rows]), (suffix_k[:n, :reach], suffix_v[:n, :reach]))

        scores = self.model(self.token[:n], self.position[:n].expand(3, n), attention_fn, head_fn=self._scores)
        self.length[:n] += self.live[:n]
        self.position[:n] += self.live[:n]
        return self._draw(scores, every)

    def _draw(self, scores: Tensor, slots: Tensor) -> Tensor:
        """Sample one token per slot from `scores` (slots, V) and record it; whose turn is over (slots,) bool."""
        at = self.length[slots]
        tokens, logps = sample(scores, uniform(self.key[slots], at), self.greedy)
        self.ids[slots, at], self.logps[slots, at], self.token[slots] = tokens, logps, tokens
        return self.live[slots] & ((tokens == self.stop_id) | (at + 1 >= self.limit[slots]))

    def _end_turns(self, slots: Tensor, over: Tensor) -> list[GeneratedSequence]:
        """Collect the sequences of those `slots` that are `over`. The host waits here, and again if there are any."""
        ended = slots[over]
        if not len(ended):
            return []
        return [self._end_turn(row) for row in self._take_turns(ended).cpu()]

    def _take_turns(self, ended: Tensor) -> Tensor:
        """What the host wants to know of slots whose turn is over, in one piece: a row each, see `_end_turn`."""
        self.live[ended] = False
        places = torch.arange(len(self.live), device=self.device)
        columns = torch.stack([places, self.length, self.position], 1), self.ids, self.logps
        return torch.cat([column[ended].double() for column in columns], 1)  # which holds each of them exactly

    def _end_turn(self, row: Tensor) -> GeneratedSequence:
        """`row`: slot, last index and next position; then by index what was sampled: ids, log-probabilities."""
        slot, end, position = map(int, row[:3].tolist())
        ids, logps = row[3:].view(2, -1)
        sequence = self.seated[slot]
        said = slice(sequence.start, end + 1)
        sequence.ids += map(int, ids[said].tolist())
        sequence.logps += logps[said].tolist()
        sequence.loss_mask += [1] * (end + 1 - sequence.start)
        sequence.cached, sequence.position, sequence.since = end, position, None
        sequence.stopped = sequence.ids[-1] == self.stop_id
        self.live_members -= 1
        return sequence


def _ragged(owners: Sequence[int], spans: Sequence[tuple[int, int]], device) -> tuple[Tensor, Tensor]:
    """Index pair (owner, place) of every place in each owner's span [start, end), one after another."""
    lens = torch.tensor([end - start for start, end in spans])
    owner = torch.tensor(owners).repeat_interleave(lens)
    place = torch.cat([torch.arange(start, end) for start, end in spans])
    return owner.to(device), place.to(device)


def _after(start: int, images: Sequence[tuple[int, Any]]) -> list[tuple[int, Any]]:
    """The images at or behind token `start`, their offsets counted from there."""
    return [(at - start, image) for at, image in images if at >= start]


def _alternate(first: Sequence[int], second: Sequence[int], device) -> Tensor:
    """Index that turns cat(all firsts, all seconds) into first 0, second 0, first 1, second 1, …"""
    parts = torch.arange(sum(first) + sum(second)).split([*first, *second])
    pairs = zip(parts[: len(first)], parts[len(first) :])
    return torch.cat([part for pair in pairs for part in pair]).to(device)
