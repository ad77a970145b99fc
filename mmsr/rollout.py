"""The multi-turn rollout: generate, stop at an action, search, resume.

Each conversation is a small state machine. The names in parentheses are the methods of `Rollout` that move it on.

    the model samples a turn ◄────────────────────────────────────────────────┐
       │ (_turn_ended)                                                        │
       ├─ out of tokens ─────────────────────────────────────► length         │
       │ (_act)                                                               │
       ├─ no action ─────────────────────────────────────────► invalid        │
       ├─ an answer ─────────────────────────────────────────► answered       │
       ├─ a search, but this was the last turn ──────────────► turns          │
       │ (_call_tool)                                                         │
    the tool runs; the conversation keeps its slot and waits                  │
       │ (_collect)                                                           │
       │ (_observe)                                                           │
       ├─ the tool failed, and that is to end the episode ───► tool-error     │
       ├─ the result does not fit ───────────────────────────► length         │
       │ (_resume)                                                            │
       └─ the result is appended as a user turn ──────────────────────────────┘

There is no barrier between turns: while the tool of one conversation runs, the others keep decoding. Tokens stay
exactly as they were sampled. What a tool gives is appended with loss mask 0.
"""

from __future__ import annotations

import time
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from typing import Callable, Sequence, Union

from mmsr.chat import Chat
from mmsr.engine import Engine, GeneratedSequence, SequenceGroup, sampling_key
from mmsr.episode import ANSWERED, INVALID, LENGTH, TOOL_ERROR, TURNS, Episode, Example, Observation, Turn
from mmsr.system.errors import UserError
from mmsr.tools import Call, Toolbox
from mmsr.vision import QWEN2_5_VL, Image, Processor, load_image

OVER_LIMIT = Observation(ok=False, error="over its limit", source="limit")
TIMED_OUT = Observation(ok=False, error="timeout: no answer in time", source="deadline")


@dataclass(frozen=True)
class Script:
    """The beginning of a conversation that is given instead of sampled (replay, RAG, demonstrations).

    The tools that forced turns call really run. Forced tokens are not trained (but see `Episode.imitate`).
    """

    turns: Sequence[str] = ()  # the first model turns, each forced as a whole
    openings: Sequence[str] = ()  # first words of the turns that follow; the model writes the rest of each


# Gives the script of an example's k-th sample, or a Future where a teacher has to write it first.
Scripts = Callable[[Example, int], Union[Script, "Future[Script]"]]


@dataclass(frozen=True)
class Limits:
    """What a rollout may use."""

    max_turns: int  # model turns; the last one cannot search, so there is at most one search less
    min_pixels: int
    max_pixels: int
    thumbnail_pixels: int = 224 * 224
    tool_seconds: float = 600.0  # a call that takes longer is given up, where tools run in threads
    stop_on_tool_error: bool = False  # end the episode (status tool-error) instead of telling the model
    processor: Processor = QWEN2_5_VL  # of the model's pictures


@dataclass(eq=False)
class _Conversation:
    """An episode while it runs."""

    episode: Episode  # gets its turns one by one, and its tokens in the end
    sequence: GeneratedSequence  # all tokens after the prompt; its `group` is None until the engine takes it
    script: Script | Future[Script]  # the next two are what remains of it
    forced_turns: list[str] = field(default_factory=list)
    openings: list[str] = field(default_factory=list)
    turn_start: int = 0  # where in `sequence.ids` the model's present or next turn begins, with its opening
    model_turns: int = 0  # forced ones included
    calls: Counter[str] = field(default_factory=Counter)  # by tool, refused ones included
    called_at: float = 0.0  # when the last tool call began, by time.monotonic


class Thumbnails:
    """The pictures among search results, decoded in the tools' threads, each once however many samples find it.

    It knows nothing of the rollout. A tool that hangs keeps this object alive for ever, and with it everything that it
    leads to: a reference to the rollout would keep the engine's whole cache.
    """

    def __init__(self, limits: Limits):
        self.min_pixels = limits.min_pixels
        self.max_pixels = limits.max_pixels  # of a tool whose pictures are shown at full size
        self.thumbnail_pixels = limits.thumbnail_pixels
        self.processor = limits.processor
        self.opened: dict[tuple[bytes, bool], Future[Image | None]] = {}

    def prepare(self, observation: Observation, full_size: bool) -> None:
        """Open the pictures of a result. A tool's thread does this, so that no decode step waits for it."""
        for hit in observation.hits:
            self.open(hit.image, full_size)

    def open(self, data: bytes | None, full_size: bool) -> Image | None:
        """The picture of an encoded file. None where there is none or it is broken: then the hit's title remains."""
        if data is None:
            return None
        mine: Future[Image | None] = Future()
        first = self.opened.setdefault((data, full_size), mine)  # one atomic step: one thread becomes the first
        if first is mine:
            first.set_result(self._load(data, self.max_pixels if full_size else self.thumbnail_pixels))
        return first.result()

    def _load(self, data: bytes, max_pixels: int) -> Image | None:
        try:
            smallest = min(self.min_pixels, max_pixels)
            # Upright, unlike the question's picture.
            return load_image(data, smallest, max_pixels, upright=True, processor=self.processor)
        except ValueError:
            return None


def _addresses(episode: Episode) -> tuple[str, ...]:
    """The addresses of all results that a rollout has had, in their order."""
    found = []
    for turn in episode.turns:
        if turn.observation is not None:
            found += [hit.url for hit in turn.observation.hits if hit.url]
    return tuple(found)


class Rollout:
    """Runs one batch of groups to its end. One use per object; afterwards `counts` has its tokens and images."""

    def __init__(self, engine: Engine, chat: Chat, toolbox: Toolbox, limits: Limits, direct: bool = False):
        """`direct`: ask without tools, in one turn."""
        self.engine = engine
        self.chat = chat
        self.toolbox = toolbox
        self.limits = limits
        self.direct = direct
        self.max_turns = 1 if direct else limits.max_turns
        self.thumbnails = Thumbnails(limits)
        self.conversations: dict[GeneratedSequence, _Conversation] = {}
        self.pending: dict[Future[Observation], _Conversation] = {}  # tool calls that are running, in their order
        self.on_done: Callable[[Episode], None] = lambda episode: None

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

        `seed`: equal parts, group ids and samples give equal random draws. `scripts`: what each conversation begins
        with; all are asked for before the first Future is waited for. `on_done` is called with each finished episode.
        `group_ids`: one for each example, where the examples are a part of a batch and so not numbered 0, 1, 2, ...

        Raises UserError for an example whose picture cannot be read.
        """
        self.on_done = on_done
        if group_ids is None:
            group_ids = range(len(examples))
        with ThreadPoolExecutor() as pool:  # decoding a picture releases the GIL
            pictures = list(pool.map(self._load_picture, examples))
        groups = []
        for example, picture, group_id in zip(examples, pictures, group_ids):
            groups.append(self._open_group(example, picture, group_id, group_size, seed, scripts))
        self._play_scripts()
        self._submit(groups)
        while self.engine.busy or self.pending:
            for sequence in self.engine.step():
                self._turn_ended(self.conversations[sequence])
            self._collect(block=not self.engine.busy)
        return [conversation.episode for conversation in self.conversations.values()]

    @property
    def counts(self) -> dict[str, int]:
        """Tokens and images of the batch, without conversations that the engine never ran.

        `prefilled_unique` counts each group's prompt once, and what is forced or comes back in each conversation.
        `parked`: conversations that outgrew their slots, so that their tokens were prefilled again.
        """
        ran = []
        for conversation in self.conversations.values():
            if conversation.sequence.group is not None:
                ran.append(conversation.episode)
        prompt_lengths = {episode.group_id: episode.prompt_length for episode in ran}
        unique = sum(prompt_lengths.values())
        sampled = 0
        images = set()
        for episode in ran:
            sampled_here = sum(episode.loss_mask)
            sampled += sampled_here
            unique += len(episode.input_ids) - episode.prompt_length - sampled_here
            images.update(image.key for _, image in episode.images)
        return {
            "prefilled": self.engine.counts["prefilled"],
            "prefilled_unique": unique,
            "sampled": sampled,
            "parked": self.engine.counts["parked"],
            "images_encoded": self.engine.counts["images_encoded"],
            "images_distinct": len(images),
        }

    # ---- setting up

    def _load_picture(self, example: Example) -> Image:
        limits = self.limits
        try:
            return load_image(example.image, limits.min_pixels, limits.max_pixels, processor=limits.processor)
        except ValueError as error:
            raise UserError(f"example {example.id}: {error}; mend or remove this row") from None

    def _open_group(
        self, example: Example, picture: Image, group_id: int, group_size: int, seed: tuple, scripts: Scripts | None
    ) -> SequenceGroup:
        """A group for the engine: one prompt, and a conversation for each sample."""
        prompt = self.chat.prompt(example.question, picture, self.direct)
        length = len(prompt.ids)
        sequences = []
        for sample in range(group_size):
            episode = Episode(
                example,
                group_id,
                sample,
                input_ids=list(prompt.ids),
                loss_mask=[0] * length,
                logps=[0.0] * length,
                images=list(prompt.images),
                prompt_length=length,
            )
            sequence = GeneratedSequence(sampling_key(*seed, group_id, sample))
            script = scripts(example, sample) if scripts else Script()
            self.conversations[sequence] = _Conversation(episode, sequence, script)
            sequences.append(sequence)
        return SequenceGroup(prompt.ids, prompt.images, sequences)

    def _submit(self, groups: Sequence[SequenceGroup]) -> None:
        """Give the engine all conversations that a script has not ended yet."""
        unfinished = []
        for group in groups:
            group.sequences = [each for each in group.sequences if not self.conversations[each].episode.status]
            if group.sequences:
                unfinished.append(group)
        for sequence in self.engine.submit(unfinished):  # gives back those whose prompt does not fit
            self._end(self.conversations[sequence], LENGTH)

    # ---- scripts, before sampling begins

    def _play_scripts(self) -> None:
        """Wait for all scripts and force their turns, tools included. No conversation is in the engine yet."""
        for conversation in self.conversations.values():
            script = conversation.script
            if isinstance(script, Future):
                script = script.result()
            conversation.forced_turns = list(script.turns)
            conversation.openings = list(script.openings)
            if conversation.forced_turns:
                self._force_turn(conversation)
            else:
                conversation.sequence.force(self._next_opening(conversation))
        while self.pending:
            self._collect(block=True)

    def _force_turn(self, conversation: _Conversation) -> None:
        """Append the script's next turn, and do what it asks for as if the model had said it."""
        text = self.chat.whole_turn(conversation.forced_turns.pop(0))
        conversation.sequence.force(self.chat.assistant(text))
        turn = self._record_turn(conversation, text, forced=True)
        if turn.end >= self.engine.max_tokens:
            self._end(conversation, LENGTH)
        else:
            self._act(conversation, turn)

    def _next_opening(self, conversation: _Conversation) -> list[int]:
        """Take the first tokens of the next turn from the script. Empty where the model starts by itself."""
        if conversation.forced_turns or not conversation.openings:
            return []
        return self.chat.opening(self.chat.whole_turn(conversation.openings.pop(0)))

    # ---- turns

    def _turn_ended(self, conversation: _Conversation) -> None:
        """The engine has sampled a turn, up to the stop token or until there was no room for more."""
        sequence = conversation.sequence
        said = sequence.ids[conversation.turn_start :]
        if sequence.stopped:
            said = said[:-1]  # without the stop token
        turn = self._record_turn(conversation, self.chat.decode(said))
        if sequence.stopped:
            self._act(conversation, turn)
        else:
            self._end(conversation, LENGTH)

    def _record_turn(self, conversation: _Conversation, text: str, forced: bool = False) -> Turn:
        """Add the model's turn, from `turn_start` to the present end of the sequence, to the episode."""
        episode = conversation.episode
        action = self.chat.parse(text)
        turn = Turn(
            "assistant",
            text,
            start=episode.prompt_length + conversation.turn_start,
            end=episode.prompt_length + len(conversation.sequence.ids),
            action=action.name,
            query=action.query,
            forced=forced,
            said=self.chat.said(text) if self.chat.thinks else None,
        )
        episode.turns.append(turn)
        conversation.model_turns += 1
        return turn

    def _act(self, conversation: _Conversation, turn: Turn) -> None:
        """Do what the model's turn asks for."""
        if turn.action is None:
            self._end(conversation, INVALID)
        elif turn.action == "answer":
            conversation.episode.answer = turn.query
            self._end(conversation, ANSWERED)
        elif conversation.model_turns >= self.max_turns:
            self._end(conversation, TURNS)
        else:
            self._call_tool(conversation, turn)

    def _call_tool(self, conversation: _Conversation, turn: Turn) -> None:
        """Start the tool that the turn names. A call over the tool's limit is refused, and the model is told so."""
        conversation.calls[turn.action] += 1
        if conversation.calls[turn.action] > self.toolbox.tools[turn.action].limit:
            self._observe(conversation, OVER_LIMIT)
            return
        example = conversation.episode.example
        conversation.called_at = time.monotonic()
        found = _addresses(conversation.episode)
        call = Call(turn.query, example.image, example.question, example.image_url, found)
        full_size = self.toolbox.tools[turn.action].full_size
        future = self.toolbox.call(turn.action, call, then=partial(self.thumbnails.prepare, full_size=full_size))
        self.pending[future] = conversation

    def _collect(self, block: bool) -> None:
        """Pass on what finished tools gave, in the order of the calls. `block` waits for at least one.

        A call that takes longer than `tool_seconds` is given up. Its thread keeps running, and its result is dropped.
        """
        if not self.pending:
            return
        patience = 0.0
        if block:
            first_call = min(conversation.called_at for conversation in self.pending.values())
            patience = max(0.0, first_call + self.limits.tool_seconds - time.monotonic())
        wait(self.pending, timeout=patience, return_when=FIRST_COMPLETED)
        now = time.monotonic()
        for future, conversation in list(self.pending.items()):  # a copy: the loop adds and removes calls
            if future.done():
                observation = future.result()
            elif now >= conversation.called_at + self.limits.tool_seconds:
                observation = TIMED_OUT
            else:
                continue
            del self.pending[future]
            self._observe(conversation, observation)

    def _observe(self, conversation: _Conversation, observation: Observation) -> None:
        """Append what came back as a user turn, and continue. Where it does not fit, none of its tokens is kept."""
        episode = conversation.episode
        call = episode.turns[-1]
        tool = self.toolbox.tools[call.action]
        thumbnails = [self.thumbnails.open(hit.image, tool.full_size) for hit in observation.hits]
        piece = self.chat.observation(call.action, observation, thumbnails, episode.example.question)
        start = episode.prompt_length + len(conversation.sequence.ids)
        turn = Turn(
            "tool",
            self.chat.decode(piece.ids),
            start=start,
            end=start,
            action=call.action,
            query=call.query,
            observation=observation,
            is_search=tool.is_search,
        )
        episode.turns.append(turn)
        failed = not observation.ok and observation is not OVER_LIMIT
        if failed and self.limits.stop_on_tool_error:
            self._end(conversation, TOOL_ERROR)
            return
        opening = self._next_opening(conversation)
        if start + len(piece.ids) + len(opening) >= self.engine.max_tokens:
            self._end(conversation, LENGTH)
            return
        turn.end = start + len(piece.ids)
        conversation.turn_start = len(conversation.sequence.ids) + len(piece.ids)
        self._resume(conversation, piece.ids + opening, piece.images)

    def _resume(self, conversation: _Conversation, ids: list[int], images: Sequence[tuple[int, Image]]) -> None:
        """Continue after these tokens: by sampling, or still with forced turns."""
        sequence = conversation.sequence
        if sequence.group is not None:  # the engine has it
            self.engine.extend(sequence, ids, images)
            return
        sequence.force(ids, images)
        if conversation.forced_turns:
            self._force_turn(conversation)

    def _end(self, conversation: _Conversation, status: str) -> None:
        """Close the episode: its tokens are the prompt's, then all of the sequence's. Give the slot back."""
        episode = conversation.episode
        sequence = conversation.sequence
        episode.status = status
        episode.input_ids += sequence.ids
        episode.loss_mask += sequence.loss_mask
        episode.logps += sequence.logps
        for offset, image in sequence.images:
            episode.images.append((episode.prompt_length + offset, image))
        if sequence.group is not None:
            self.engine.finish(sequence)
        self.on_done(episode)
