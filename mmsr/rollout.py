"""The multi-turn rollout: generate, interrupt at an action, search, resume.

    sampling ──turn ends──► answer ─────────────────────────────────► answered
       ▲                    no action ──────────────────────────────► invalid
       │                    out of tokens ──────────────────────────► length
       │                    search, but it was the last turn ───────► turns
       └──── observation ◄─ search: the tool runs, the slot waits

Nobody waits for anybody else: while one episode's tool runs, the others go on decoding. Tokens stay exactly as sampled;
what comes back is appended as a user turn with mask 0.
"""

from __future__ import annotations

import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Callable, Sequence, Union

from mmsr.chat import Chat
from mmsr.engine import Engine, GeneratedSequence, SequenceGroup, sampling_key
from mmsr.episode import ANSWERED, INVALID, LENGTH, TOOL_ERROR, TURNS, Episode, Example, Observation, Turn
from mmsr.system.errors import UserError
from mmsr.tools import Call, Toolbox
from mmsr.vision import Image, load_image

OVER_LIMIT = Observation(ok=False, error="over its limit", source="limit")
LATE = Observation(ok=False, error="timeout: no answer in time", source="deadline")


@dataclass(frozen=True)
class Script:
    """The beginning of a conversation that is given instead of sampled (replay, RAG, demonstrations).

    The tools that forced turns call really run. Forced tokens are not trained (but see `Episode.imitate`).
    """

    turns: Sequence[str] = ()  # the first model turns, each forced as a whole
    openings: Sequence[str] = ()  # first words of the turns that follow; the model writes the rest of each


# Gives the script of an example's k-th sample, or a Future of it where it has to be written first.
Scripts = Callable[[Example, int], Union[Script, "Future[Script]"]]


@dataclass(frozen=True)
class Limits:
    """What a rollout may use. `max_turns` counts model turns, so it bounds the searches in all at one less."""

    max_turns: int
    min_pixels: int
    max_pixels: int
    thumbnail_pixels: int = 224 * 224
    tool_seconds: float = 600.0  # a call that takes longer is given up, where tools run in threads
    stop_on_tool_error: bool = False  # end the episode (status tool-error) instead of telling the model


@dataclass(eq=False)
class _Run:
    """An episode under way."""

    episode: Episode
    sequence: GeneratedSequence
    script: Script | Future[Script]
    forced: list[str] = field(default_factory=list)  # turns of the script that are still to be forced
    openings: list[str] = field(default_factory=list)
    begun: int | None = None  # where in member.ids the coming turn began, if its opening was forced
    calls: dict[str, int] = field(default_factory=dict)
    turns: int = 0
    called: float = 0.0  # when the tool was, by time.monotonic


class Thumbnails:
    """The pictures among search results, each opened once, however many members find it; in the tools' threads.

    It knows nothing of the rollout. A tool that hangs holds on to this object for ever, and a rollout that it led to
    would stay too, with the engine's whole cache.
    """

    def __init__(self, limits: Limits):
        self.most = limits.thumbnail_pixels  # pixels
        self.least = min(limits.min_pixels, self.most)
        self.opened: dict[bytes, Future[Image | None]] = {}

    def prepare(self, seen: Observation) -> None:
        """Open the pictures among what came back, in the tool's thread and not between two decode steps."""
        for hit in seen.hits:
            self.open(hit.image)

    def open(self, data: bytes | None) -> Image | None:
        """The picture of an encoded file; None where there is none or it is broken: the hit's title remains."""
        if data is None:
            return None
        opening: Future[Image | None] = Future()
        first = self.opened.setdefault(data, opening)
        if first is opening:
            opening.set_result(self._load(data))
        return first.result()

    def _load(self, data: bytes) -> Image | None:
        try:
            return load_image(data, self.least, self.most, True)  # upright, unlike the question's
        except ValueError:
            return None


class Rollout:
    """Runs one batch of groups to its end. One use per object; afterwards `counts` has its tokens and images."""

    def __init__(self, engine: Engine, chat: Chat, toolbox: Toolbox, limits: Limits, direct: bool = False):
        """`direct`: ask without tools, in one turn."""
        self.engine, self.chat, self.toolbox, self.limits = engine, chat, toolbox, limits
        self.direct, self.max_turns = direct, 1 if direct else limits.max_turns
        self.runs: dict[GeneratedSequence, _Run] = {}
        self.waiting: dict[Future, _Run] = {}
        self.thumbnails = Thumbnails(limits)

    def __call__(
        self,
        examples: Sequence[Example],
        group_size: int,
        seed: tuple = (),
        scripts: Scripts | None = None,
        on_done: Callable[[Episode], None] = lambda episode: None,
        group_ids: Sequence[int] | None = None,
    ) -> list[Episode]:
        """Roll out `group_size` episodes per example, in order; group i belongs to examples[i].

        `group_ids`: the examples' own, where they are not all of a batch and so not 0, 1, 2, ...

        `seed` parts make the randomness: equal parts, group and sample give equal draws. `scripts(example, sample)` are
        what each conversation begins with; all are asked for before one that is a Future is waited for.
        """
        ids = range(len(examples)) if group_ids is None else group_ids
        with ThreadPoolExecutor() as pool:  # opening pictures lets go of the interpreter
            pictures = list(pool.map(self._picture, examples))
        groups = [self._open(*each, group_size, seed, scripts) for each in zip(examples, pictures, ids)]
        episodes = [self.runs[sequence].episode for group in groups for sequence in group.sequences]
        self.on_done = on_done
        self._play_scripts()
        for group in groups:  # members whose script already ended have nothing to sample
            group.sequences = [sequence for sequence in group.sequences if not self.runs[sequence].episode.status]
        for sequence in self.engine.submit([group for group in groups if group.sequences]):
            self._end(self.runs[sequence], LENGTH)
        while self.engine.busy or self.waiting:
            for sequence in self.engine.step():
                self._turn_ended(self.runs[sequence])
            self._collect(block=not self.engine.busy)
        return episodes

    @property
    def counts(self) -> dict[str, int]:
        """Tokens and images of the batch; unique = every group's prompt once and what its members do not share."""
        episodes = [run.episode for run in self.runs.values() if run.sequence.group is not None]  # those that ran
        prompts = {e.group_id: e.prompt_length for e in episodes}
        forced = sum(len(e.input_ids) - e.prompt_length - sum(e.loss_mask) for e in episodes)
        return {
            "prefilled": self.engine.counts["prefilled"],
            "prefilled_unique": sum(prompts.values()) + forced,
            "sampled": sum(sum(e.loss_mask) for e in episodes),
            "images_encoded": self.engine.counts["images_encoded"],
            "images_distinct": len({image.key for e in episodes for _, image in e.images}),
        }

    # ---- setting up --------------------------------------------------------------------------------------------------

    def _picture(self, example: Example) -> Image:
        try:
            return load_image(example.image, self.limits.min_pixels, self.limits.max_pixels)
        except ValueError as error:
            raise UserError(f"example {example.id}: {error}; mend or remove this row") from None

    def _open(
        self, example: Example, image: Image, group_id: int, size: int, seed: tuple, scripts: Scripts | None
    ) -> SequenceGroup:
        prompt = self.chat.prompt(example.question, image, self.direct)
        sequences = []
        for sample in range(size):
            sequence = GeneratedSequence(sampling_key(*seed, group_id, sample))
            length = len(prompt.ids)
            episode = Episode(example, group_id, sample, list(prompt.ids), [0] * length, [0.0] * length)
            episode.images, episode.prompt_length = list(prompt.images), length
            self.runs[sequence] = _Run(episode, sequence, scripts(example, sample) if scripts else Script())
            sequences.append(sequence)
        return SequenceGroup(prompt.ids, prompt.images, sequences)

    def _play_scripts(self) -> None:
        """Run all scripts to their last forced turn, tools included, before sampling begins."""
        for run in self.runs.values():
            script = run.script.result() if isinstance(run.script, Future) else run.script
            run.forced, run.openings = list(script.turns), list(script.openings)
            if not run.forced and run.openings:
                run.begun = 0
                run.sequence.force(self._opening(run))
            self._force_turn(run)
        while self.waiting:
            self._collect(block=True)

    def _force_turn(self, run: _Run) -> None:
        if not run.forced:
            return
        text = run.forced.pop(0)
        start = len(run.sequence.ids)
        run.sequence.force(self.chat.assistant(text))
        turn = self._turn(run, text, start, forced=True)
        if turn.end >= self.engine.max_tokens:
            return self._end(run, LENGTH)
        self._act(run, turn)

    def _opening(self, run: _Run) -> list[int]:
        """Ids of the opening that the script has for the coming turn; none where it has none."""
        return self.chat.opening(run.openings.pop(0)) if run.openings and not run.forced else []

    # ---- turns ------------------------------------------------------------------------------------------------------

    def _turn_ended(self, run: _Run) -> None:
        sequence, start = run.sequence, run.sequence.start
        if run.begun is not None:
            start, run.begun = run.begun, None
        text = self.chat.decode(sequence.ids[start : len(sequence.ids) - sequence.stopped])
        turn = self._turn(run, text, start)
        if sequence.stopped:
            self._act(run, turn)
        else:
            self._end(run, LENGTH)

    def _turn(self, run: _Run, text: str, start: int, forced: bool = False) -> Turn:
        action = self.chat.parse(text)
        base = run.episode.prompt_length
        turn = Turn("assistant", text, base + start, base + len(run.sequence.ids), action.name, action.query, forced)
        run.episode.turns.append(turn)
        run.turns += 1
        return turn

    def _act(self, run: _Run, turn: Turn) -> None:
        """Do what the model's turn asks for."""
        if turn.action is None:
            return self._end(run, INVALID)
        if turn.action == "answer":
            run.episode.answer = turn.query
            return self._end(run, ANSWERED)
        if run.turns >= self.max_turns:
            return self._end(run, TURNS)
        run.calls[turn.action] = run.calls.get(turn.action, 0) + 1
        if run.calls[turn.action] > self.toolbox.tools[turn.action].limit:
            return self._observe(run, OVER_LIMIT)
        example, run.called = run.episode.example, time.monotonic()
        call = Call(turn.query, example.image, example.question, example.image_url)
        self.waiting[self.toolbox.call(turn.action, call, self.thumbnails.prepare)] = run

    def _collect(self, block: bool) -> None:
        """Hand finished tools' observations over, in the order of the calls; `block` waits for at least one.

        A call that hangs is given up: its thread goes on, nobody waits for it.
        """
        if not self.waiting:
            return
        deadline = min(run.called for run in self.waiting.values()) + self.limits.tool_seconds
        patience = max(0.0, deadline - time.monotonic()) if block else 0.0
        wait(self.waiting, timeout=patience, return_when=FIRST_COMPLETED)
        now = time.monotonic()
        for future, run in list(self.waiting.items()):
            late = now >= run.called + self.limits.tool_seconds
            if future.done() or late:
                del self.waiting[future]
                self._observe(run, future.result() if future.done() else LATE)

    def _observe(self, run: _Run, seen: Observation) -> None:
        """Append what came back as a user turn, and go on: with the next forced turn, or by sampling."""
        sequence, call, example = run.sequence, run.episode.turns[-1], run.episode.example
        thumbnails = [self.thumbnails.open(hit.image) for hit in seen.hits]
        piece = self.chat.observation(call.action, seen, thumbnails, example.question)
        start = run.episode.prompt_length + len(sequence.ids)
        turn = Turn("tool", self.chat.decode(piece.ids), start, start, call.action, call.query, observation=seen)
        run.episode.turns.append(turn)
        if not seen.ok and seen is not OVER_LIMIT and self.limits.stop_on_tool_error:
            return self._end(run, TOOL_ERROR)
        opening = self._opening(run)
        if start + len(piece.ids) + len(opening) >= self.engine.max_tokens:
            return self._end(run, LENGTH)
        turn.end += len(piece.ids)
        run.begun = len(sequence.ids) + len(piece.ids) if opening else None
        if sequence.group is not None:
            return self.engine.extend(sequence, piece.ids + opening, piece.images)
        sequence.force(piece.ids + opening, piece.images)  # before sampling begins
        self._force_turn(run)

    def _end(self, run: _Run, status: str) -> None:
        """Close the episode: its tokens are the prompt's and the member's, as they stand."""
        episode, sequence = run.episode, run.sequence
        episode.status = status
        base = episode.prompt_length
        episode.input_ids += sequence.ids
        episode.loss_mask += sequence.loss_mask
        episode.logps += sequence.logps
        episode.images += [(base + at, image) for at, image in sequence.images]
        if sequence.group is not None:
            self.engine.finish(sequence)
        self.on_done(episode)
