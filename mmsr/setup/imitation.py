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


def is_right(turns: Sequence[str], example: Example, chat: Chat, rule: RewardRule) -> bool:
    """Whether the last of these turns ends a conversation with the right answer, and the others call tools."""
    asked_for = [chat.parse(chat.whole_turn(turn)).name for turn in turns]
    if not turns or asked_for[-1] != ANSWER or None in asked_for or ANSWER in asked_for[:-1]:
        return False
    last = Turn("assistant", turns[-1], 0, 0)
    episode = Episode(example, 0, 0, turns=[last], status=ANSWERED)
    return answer_score(episode, rule) == 1


def open_teacher(address: str, name: str, journal: Path, chat: Chat, toolbox: Toolbox, limits: Limits) -> Teacher:
    """The model `name` behind a server. It writes turns when they are asked for; the file `journal` keeps them."""
    from mmsr.data.teacher import ANSWER_TOKENS, Teacher
    from mmsr.net.completions import open_server

    complete = partial(open_server(address, name).complete, max_tokens=ANSWER_TOKENS)
    return Teacher(complete, name, journal, chat, toolbox, limits)
