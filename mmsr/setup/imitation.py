"""Turns that a run imitates: those of demonstrations in files, or of a teacher behind a server."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mmsr.chat import ANSWER, Chat
from mmsr.data.formats import Dataset
from mmsr.data.recorded import demonstrations
from mmsr.episode import ANSWERED, Episode, Example, Turn
from mmsr.reward import RewardRule, answer_score
from mmsr.rollout import Limits, Script, Scripts
from mmsr.system.errors import UserError
from mmsr.system.parallel import Ranks
from mmsr.tools import Toolbox

if TYPE_CHECKING:
    from mmsr.data.teacher import Teacher


def open_demonstrations(
    files: Sequence[str], questions: Sequence[Example], chat: Chat, rule: RewardRule, ranks: Ranks
) -> tuple[Sequence[Example], Scripts]:
    """The questions that --demonstrations shows rightly answered, and the turns that did so.

    Raises UserError where no question is answered rightly.
    """
    found = demonstrations(files)
    _check_grammar(files, [turns for conversations in found.values() for turns in conversations], chat)

    def right_turns(example: Example) -> list[list[str]]:
        return [turns for turns in found.get(example.id, ()) if is_right(turns, example, chat, rule)]

    known = False  # whether a conversation is about any of the questions
    right = 0  # conversations
    places = []  # of the questions that one answers rightly
    for place, example in enumerate(questions):
        if example.id not in found:
            continue
        known = True
        count = len(right_turns(example))
        right += count
        if count:
            places.append(place)
    if not places:
        complaint = "answers a question rightly" if known else "is about a question of --data: ids must be the same"
        raise UserError(f"--demonstrations {' '.join(files)}: none of {len(found)} {complaint}; give others")
    conversations = sum(map(len, found.values()))
    on = f"on {len(places)} of {len(questions)} questions"
    ranks.print(f"Demonstrations: {right} of {conversations} are right, {on}.")

    def script(example: Example, sample: int) -> Script:
        conversations = right_turns(example)
        return Script(conversations[sample % len(conversations)])

    if isinstance(questions, Dataset):
        questions.keep(places)
        return questions, script
    return [questions[place] for place in places], script


def _check_grammar(files: Sequence[str], conversations: Sequence[Sequence[str]], chat: Chat) -> None:
    """Raises UserError where most conversations of several turns have one that asks for nothing in the run's grammar.

    The others would be left, those that answer at once, and they teach never to search.
    """
    several = [turns for turns in conversations if len(turns) > 1]
    unread = [turns for turns in several if None in _asked_for(turns, chat)]
    if len(unread) > len(several) / 2:
        some = f"{len(unread)} of {len(several)} conversations of several turns have one that asks for nothing"
        raise UserError(
            f"--demonstrations {' '.join(files)}: {some} in --grammar {chat.grammar}: give the one they are written in"
        )


def _asked_for(turns: Sequence[str], chat: Chat) -> list[str | None]:
    """The name of each turn's action."""
    return [chat.parse(chat.whole_turn(turn)).name for turn in turns]


def is_right(turns: Sequence[str], example: Example, chat: Chat, rule: RewardRule) -> bool:
    """Whether the last of these turns ends a conversation with the right answer, and the others call tools."""
    names = _asked_for(turns, chat)
    if not turns or names[-1] != ANSWER or None in names or ANSWER in names[:-1]:
        return False
    last = Turn("assistant", turns[-1], 0, 0, said=chat.said(chat.whole_turn(turns[-1])))
    episode = Episode(example, 0, 0, turns=[last], status=ANSWERED)
    return answer_score(episode, rule) == 1


def open_teacher(address: str, name: str, journal: Path, chat: Chat, toolbox: Toolbox, limits: Limits) -> Teacher:
    """The model `name` behind a server. It writes turns when they are asked for; the file `journal` keeps them."""
    from mmsr.data.teacher import ANSWER_TOKENS, Teacher
    from mmsr.net.completions import open_server

    complete = partial(open_server(address, name).complete, max_tokens=ANSWER_TOKENS)
    return Teacher(complete, name, journal, chat, toolbox, limits)
