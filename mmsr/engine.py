"""Generation: batched sampling over a KV cache, for groups of conversations that stop, wait for a tool and go on.

A *group* is one prompt with several members. Its prompt and image are prefilled once into a **prefix row**; each member
takes a **slot** that holds the keys and values of its own tokens. A turn ends at the stop token or its token limit; the
caller then either finishes the member or extends it with what a tool gave, and only those new tokens are prefilled. The
other members decode on meanwhile: there is no barrier between turns, and freed slots take the next group.

All that changes per token lives in tensors on the device. The host waits for it once a decode step, to see whose turn
is over, and does no work per token; on CUDA it launches the step as one graph (graphs.py).

Sampling is a pure function of (seed key, token index): inverse CDF of a counter-based uniform, no generator, no state.
Shape letters: S slots, R prefix rows, G members, K key/value heads, P prompt room, L suffix room, D head size,
V vocabulary.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections import Counter, deque
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import Packed, Segments, decode_attention, packed_attention
from .graphs import Graphs
from .model import ModelConfig, Qwen2_5_VL, logits, mrope_positions


@dataclass(eq=False)
class Member:
    """One conversation being generated. `ids` is everything after the prompt; the three lists are aligned.

    A member may open with forced tokens in `ids` (log-probability and mask 0).
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
    group: Group | None = None

    def force(self, ids: list[int], images: Sequence[tuple[int, Any]] = ()) -> None:
        """Append tokens that are given, not sampled. `images`: (offset within these tokens, vision.Image)."""
        self.images += [(len(self.ids) + at, image) for at, image in images]
        self.ids += ids
        self.logps += [0.0] * len(ids)
        self.loss_mask += [0] * len(ids)


@dataclass(eq=False)
class Group:
    """A prompt and the members that share it."""

    ids: list[int]
    images: list[tuple[int, Any]]
    members: list[Member]
    row: int = -1
    unfinished: int = 0


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


def sample(scores: Tensor, noise: Tensor, greedy: bool) -> tuple[Tensor, Tensor]:
    """Token ids and their log-probabilities (n,) under softmax(`scores` (n, V)), by inverse CDF of `noise` (n,)."""
    logps = scores.log_softmax(-1)
    if greedy:
        tokens = scores.argmax(-1)
    else:
        mass = logps.double().exp().cumsum(-1)
        tokens = torch.searchsorted(mass, (noise * mass[:, -1])[:, None], right=True)[:, 0]
        tokens = tokens.clamp_(max=scores.shape[1] - 1)
    return tokens, logps.gather(1, tokens[:, None])[:, 0]


class Cache:
    """Keys and values of every layer: prefix rows (R, K, P, D) and suffix slots (S, K, L, D). L grows as it is needed.

    Zeros, because attention multiplies what lies beyond a sequence by 0, and 0 · NaN is NaN.
    """

    def __init__(self, config: ModelConfig, rows: int, prompt_room: int, slots: int, device, dtype):
        def room(n: int, length: int) -> list[tuple[Tensor, ...]]:
            shape, layers = (n, config.num_key_value_heads, length, config.head_dim), range(config.num_hidden_layers)
            return [tuple(torch.zeros(shape, device=device, dtype=dtype) for _ in "kv") for _ in layers]

        self.prefix, self.suffix = room(rows, prompt_room), room(slots, 0)

    def fit(self, length: int, most: int) -> bool:
        """Make the suffix slots at least `length` tokens long, and no longer than `most`; whether that moved them.

        One layer at a time, so that a second copy is never there of more than one.
        """
        now = self.suffix[0][0].shape[2]
        if length <= now:
            return False
        more = (0, 0, 0, min(most, max(length, 2 * now)) - now)
        for layer, pair in enumerate(self.suffix):
            self.suffix[layer] = tuple(F.pad(store, more) for store in pair)
        return True


class Engine:
    """Generates for `model`: `submit` groups once, then `step` while `busy`; finish or extend what it returns."""

    def __init__(
        self,
        model: Qwen2_5_VL,
        stop_id: int,
        banned: Tensor,  # (V,) bool: ids that may not be sampled
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
        `capture`: on CUDA, replay decode steps from graphs; not for a sharded model, whose weights move.
        """
        self.model, self.stop_id, self.banned, self.device = model, stop_id, banned, banned.device
        self.slots, self.max_tokens, self.turn_tokens = slots, max_tokens, turn_tokens
        self.greedy, self.temperature = temperature == 0, temperature or 1.0
        self.prefill_tokens = prefill_tokens
        self.graphs = Graphs(capture and self.device.type == "cuda")
        self.queue: deque[Group] = deque()
        self.feeding: list[Member] = []  # have forced tokens to prefill
        self.live_members = 0  # are decoding
        self.seated: dict[int, Member] = {}  # by slot; includes those that wait for a tool
        self.counts: Counter = Counter()  # prefilled, decode_steps, images_encoded
        self.features: dict[str, Tensor] = {}  # encoded images, by content: weights stand still while an engine lives

    # ---- what a caller uses -----------------------------------------------------------------------------------------

    def submit(self, groups: Sequence[Group]) -> list[Member]:
        """Queue groups and make room for them. Returns members without room to answer; their groups will not run."""
        assert not self.seated, "an engine takes its groups once"
        refused = []
        for group in groups:
            known = len(group.ids) + max(len(member.ids) for member in group.members)
            if known < self.max_tokens and len(group.members) <= self.slots:
                self.queue.append(group)
            else:
                refused += group.members
        if self.queue:
            self._make_room()
        return refused

    @property
    def busy(self) -> bool:
        """Whether `step` has something to do (members that wait for a tool are not its business)."""
        return bool(self.feeding or self.live_members or (self.queue and self._admissible()))

    def extend(self, member: Member, ids: list[int], images: Sequence[tuple[int, Any]] = ()) -> None:
        """Give a waiting member what came back; it samples its next turn after it. `images`: (offset in ids, Image).

        Raises ValueError where that leaves no room for a token: finish the member instead.
        """
        known = len(member.group.ids) + len(member.ids) + len(ids)
        if known >= self.max_tokens:
            raise ValueError(f"{len(ids)} more tokens make {known}, which leaves no room under {self.max_tokens}")
        member.force(ids, images)
        self.feeding.append(member)

    def finish(self, member: Member) -> None:
        """Give a member's slot back, and the prefix row with the last of its group."""
        self.free_slots.append(member.slot)
        del self.seated[member.slot]
        member.group.unfinished -= 1
        if not member.group.unfinished:
            self.free_rows.append(member.group.row)
        self.layout = None

    @torch.no_grad()
    def step(self) -> list[Member]:
        """Admit what fits, prefill what is new, decode one token everywhere; returns members whose turn ended."""
        ended = []
        if self.queue:
            ended += self._admit(self._admissible())
        if self.feeding:
            ended += self._feed()
        if self.live_members:
            ended += self._decode()
        return ended

    # ---- room -------------------------------------------------------------------------------------------------------

    def _make_room(self) -> None:
        """Size cache and slot state to what is queued."""
        prompts = [len(group.ids) for group in self.queue]
        width = min(self.slots, sum(len(group.members) for group in self.queue))
        rows = min(len(prompts), width // min(len(group.members) for group in self.queue))
        self.room = room = self.max_tokens - min(prompts) + 1
        config, dtype = self.model.config, next(self.model.parameters()).dtype
        self.cache = Cache(config, rows, max(prompts), width, self.device, dtype)
        self.free_slots, self.free_rows = list(range(width)), list(range(rows))
        self.layout = None
        self.graphs.clear()

        def state(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.zeros((width, *shape), dtype=dtype, device=self.device)

        self.token, self.length, self.position = (state(torch.long) for _ in range(3))  # fed next; tokens cached; where
        self.key, self.limit, self.live = state(torch.long), state(torch.long), state(torch.bool)
        self.ids, self.logps = state(torch.long, room), state(torch.float32, room)  # what was sampled, by suffix index
        most = max(len(group.members) for group in self.queue)
        self.prefix_lens, self.members, self.place = (
            torch.zeros(size, dtype=torch.long, device=self.device) for size in (rows, rows * most, width)
        )

    def _admissible(self) -> list[Group]:
        """The queued groups that have room now: whole groups, in order, one prefill pass's worth of prompts."""
        groups: list[Group] = []
        slots, tokens = len(self.free_slots), 0
        for group in self.queue:
            slots, tokens = slots - len(group.members), tokens + len(group.ids)
            if slots < 0 or len(groups) == len(self.free_rows) or (groups and tokens > self.prefill_tokens):
                break
            groups.append(group)
        return groups

    def _admit(self, groups: list[Group]) -> list[Member]:
        """Prefill the prompts in one packed pass; members without an opening sample their first token from it."""
        if not groups:
            return []
        self.free_slots.sort(), self.free_rows.sort()
        for group in groups:
            self.queue.popleft()
            group.row, group.unfinished = self.free_rows.pop(0), len(group.members)
            for member in group.members:
                member.group, member.slot = group, self.free_slots.pop(0)
                self.seated[member.slot] = member
        self.layout = None
        scores, positions = self._prefill_prompts(groups)
        rows, starting = [], []
        for row, group in enumerate(groups):
            for member in group.members:
                member.position = positions[row]
                if member.ids:
                    self.feeding.append(member)
                else:
                    rows.append(row), starting.append(member)
        return self._start(scores[rows], starting) if starting else []

    def _lay_out(self) -> tuple[int, int, int]:
        """Write down for decoding who sits where; needed only when somebody came or went.

        That is `prefix_lens` (R,), `members` (R · G,) and `place` (S,), see `decode_attention`. Returns S, R and G: the
        slots and rows in use, both counted to the last, and the largest number of seated members of a group.
        """
        slots = sorted(self.seated)
        if 2 * len(slots) <= slots[-1]:
            self._compact(slots)
        groups = list(dict.fromkeys(member.group for member in self.seated.values()))
        n, rows = max(self.seated) + 1, max(group.row for group in groups) + 1
        seats = [[m.slot for m in group.members if self.seated.get(m.slot) is m] for group in groups]
        width = max(map(len, seats))
        lens, members, place = torch.zeros(rows).long(), torch.zeros(rows, width).long(), torch.zeros(n).long()
        for group, here in zip(groups, seats):
            lens[group.row] = len(group.ids)
            members[group.row, : len(here)] = torch.tensor(here)
            place[here] = group.row * width + torch.arange(len(here))
        for buffer, found in zip((self.prefix_lens, self.members, self.place), (lens, members.flatten(), place)):
            buffer[: len(found)] = found.to(self.device)
        self.length[self.free_slots] = 0
        now = self.counts["decode_steps"]
        cached = (m.cached + (0 if m.since is None else now - m.since) for m in self.seated.values())
        self.reach = max(cached)  # no slot has more tokens cached than this
        return n, rows, width

    def _compact(self, slots: list[int]) -> None:
        """Move the few occupied slots and rows to the front, so that the tail of a batch does not pay for its head."""
        groups = list(dict.fromkeys(self.seated[slot].group for slot in slots))
        rows = [group.row for group in groups]
        for layer_prefix, layer_suffix in zip(self.cache.prefix, self.cache.suffix):
            for store, kept in [*((x, rows) for x in layer_prefix), *((x, slots) for x in layer_suffix)]:
                store[: len(kept)] = store[kept]
        for state in (self.token, self.length, self.position, self.key, self.limit, self.live, self.ids, self.logps):
            state[: len(slots)] = state[slots]
        self.live[len(slots) :] = False
        for row, group in enumerate(groups):
            group.row = row
        self.seated = {place: self.seated[slot] for place, slot in enumerate(slots)}
        for slot, member in self.seated.items():
            member.slot = slot
        self.free_slots = list(range(len(slots), len(self.token)))
        self.free_rows = list(range(len(rows), len(self.cache.prefix[0][0])))

    # ---- passes -----------------------------------------------------------------------------------------------------

    def _prefill_prompts(self, groups: Sequence[Group]) -> tuple[Tensor, list[int]]:
        """Run prompts through the model into their rows; returns scores after them (groups, V) and next positions."""
        at = _ragged([group.row for group in groups], [(0, len(group.ids)) for group in groups], self.device)
        packed = Packed([len(group.ids) for group in groups], self.device)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            for store, new in zip(self.cache.prefix[layer], (k, v)):
                store.transpose(1, 2)[at] = new
            return packed(layer, q, k, v)

        return self._forward([(group.ids, group.images, 0) for group in groups], attend)

    def _feed(self) -> list[Member]:
        """Prefill the forced tokens of waiting members: each sees its prompt, its own past, and the new tokens."""
        members = self._next_to_feed()
        slots, prompts = [m.slot for m in members], [len(m.group.ids) for m in members]
        total = [len(m.ids) for m in members]
        prefix_at = _ragged([m.group.row for m in members], [(0, n) for n in prompts], self.device)
        suffix_at = _ragged(slots, [(0, n) for n in total], self.device)
        new_at = _ragged(slots, [(m.cached, n) for m, n in zip(members, total)], self.device)
        order = _alternate(prompts, total, self.device)
        self._fit(max(total))
        news = [n - m.cached for m, n in zip(members, total)]
        segments = Segments.of(news, [p + n for p, n in zip(prompts, total)], True, self.device)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            seen = []
            for prefix, suffix, new in zip(self.cache.prefix[layer], self.cache.suffix[layer], (k, v)):
                suffix.transpose(1, 2)[new_at] = new
                seen.append(torch.cat([prefix.transpose(1, 2)[prefix_at], suffix.transpose(1, 2)[suffix_at]])[order])
            return packed_attention(q, *seen, segments)

        pieces = [(m.ids[m.cached :], _after(m.cached, m.images), m.position) for m in members]
        scores, positions = self._forward(pieces, attend)
        for member, position in zip(members, positions):
            member.cached, member.position = len(member.ids), position
        return self._start(scores, members)

    def _fit(self, length: int) -> None:
        if self.cache.fit(length, self.room):
            self.graphs.clear()

    def _next_to_feed(self) -> list[Member]:
        """As many waiting members, in order, as one prefill pass may hold; at least one."""
        tokens = list(accumulate(len(member.ids) - member.cached for member in self.feeding))
        n = max(1, bisect_right(tokens, self.prefill_tokens))
        members, self.feeding = self.feeding[:n], self.feeding[n:]
        return members

    def _forward(self, pieces: Sequence[tuple[list[int], list, int]], attend) -> tuple[Tensor, list[int]]:
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
            attend,
            self._encode(images),
            torch.cat(index).to(self.device) if index else None,
            read=lambda hidden, head: self._scores(hidden[last], head),
        )
        return scores, ends

    def _scores(self, hidden: Tensor, head: Tensor) -> Tensor:
        return logits(hidden, head, self.temperature, self.banned)

    def _encode(self, images: Sequence) -> Tensor | None:
        """Features of `images` in order; each distinct one goes through the tower once in the engine's life."""
        new = {image.key: image for image in images if image.key not in self.features}
        if new:
            encoded = self.model.encode_images(list(new.values()))
            self.features.update(zip(new, encoded.split([image.tokens for image in new.values()])))
            self.counts["images_encoded"] += len(new)
        return torch.cat([self.features[image.key] for image in images]) if images else None

    def _start(self, scores: Tensor, members: Sequence[Member]) -> list[Member]:
        """Begin a turn: sample its first token from `scores` (members, V)."""
        slots = torch.tensor([m.slot for m in members], device=self.device)
        limits = [min(len(m.ids) + self.turn_tokens, self.max_tokens - len(m.group.ids)) for m in members]
        values = [[m.cached for m in members], [m.position for m in members], [m.key for m in members], limits]
        for state, value in zip((self.length, self.position, self.key, self.limit), values):
            state[slots] = torch.tensor(value, device=self.device)
        for member in members:
            member.start, member.since = len(member.ids), self.counts["decode_steps"]
        self.live[slots] = True
        self.live_members += len(members)
        self.layout = None
        return self._end_turns(slots, self._draw(scores, slots))

    def _decode(self) -> list[Member]:
        """Feed every slot its last token and sample the next where a member is live."""
        if self.layout is None:
            self.layout = self._lay_out()
        self.reach += 1
        reach = self.graphs.rounded(self.reach, self.room)
        self._fit(reach)
        self.counts["decode_steps"] += 1
        shape = (*self.layout, reach)
        return self._end_turns(
            torch.arange(shape[0], device=self.device), self.graphs(shape, partial(self._one, *shape))
        )

    def _one(self, n: int, rows: int, width: int, reach: int) -> Tensor:
        """The pass of a decode step, for slots [0, n) with up to `reach` tokens: whose turn is over (n,) bool."""
        every, length = torch.arange(n, device=self.device), self.length[:n].clone()
        members = self.members[: rows * width].view(rows, width)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            for store, new in zip(self.cache.suffix[layer], (k, v)):
                store[every, :, length] = new  # a waiting slot's next place: overwritten when it goes on
            prefix = tuple(x[:rows] for x in self.cache.prefix[layer])
            suffix = tuple(x[:n, :, :reach] for x in self.cache.suffix[layer])
            return decode_attention(q, prefix, self.prefix_lens[:rows], members, self.place[:n], suffix, length + 1)

        scores = self.model(self.token[:n], self.position[:n].expand(3, n), attend, read=self._scores)
        self.length[:n] += self.live[:n]
        self.position[:n] += self.live[:n]
        return self._draw(scores, every)

    def _draw(self, scores: Tensor, slots: Tensor) -> Tensor:
        """Sample one token per slot from `scores` (slots, V) and record it; whose turn is over (slots,) bool."""
        at = self.length[slots]
        tokens, logps = sample(scores, uniform(self.key[slots], at), self.greedy)
        self.ids[slots, at], self.logps[slots, at], self.token[slots] = tokens, logps, tokens
        return self.live[slots] & ((tokens == self.stop_id) | (at + 1 >= self.limit[slots]))

    def _end_turns(self, slots: Tensor, over: Tensor) -> list[Member]:
        """Collect the members of those `slots` that are `over`. The host waits here, and again if there are any."""
        ended = slots[over]
        if not len(ended):
            return []
        self.live[ended] = False
        places = torch.arange(len(self.live), device=self.device)
        columns = torch.stack([places, self.length, self.position], 1), self.ids, self.logps
        found = torch.cat([column[ended].double() for column in columns], 1)  # which holds each of them exactly
        return [self._end_turn(row) for row in found.cpu()]

    def _end_turn(self, row: Tensor) -> Member:
        """`row`: slot, last index and next position; then by index what was sampled: ids, log-probabilities."""
        slot, end, position = map(int, row[:3].tolist())
        ids, logps = row[3:].view(2, -1)
        member = self.seated[slot]
        said = slice(member.start, end + 1)
        member.ids += map(int, ids[said].tolist())
        member.logps += logps[said].tolist()
        member.loss_mask += [1] * (end + 1 - member.start)
        member.cached, member.position, member.since = end, position, None
        member.stopped = member.ids[-1] == self.stop_id
        self.live_members -= 1
        return member


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
