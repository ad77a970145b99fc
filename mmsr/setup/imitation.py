"""Turns that a run imitates: those of demonstrations in files, or of a teacher behind a server."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mmsr.chat import ANSWER, Chat
from mmsr.config import Config
from mmsr.data.formats import Dataset
from mmsr.data.recorded import demonstrations
from mmsr.episode import ANSWERED, Episode, Example, Turn
from mmsr.reward import RewardRule, answer_score
from mmsr.rollout import Scripts
from mmsr.setup.search import rollout_limits
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
        return [said for said in found.get(example.id, ()) if is_right(said, example, chat, rule)]

    known = [place for place, example in enumerate(questions) if example.id in found]
    shown = {place: len(right_turns(questions[place])) for place in known}
    places = [place for place in known if shown[place]]
    if not places:
        complaint = "answers a question rightly" if known else "is about a question of --data: ids must be the same"
        raise UserError(f"--demonstrations {' '.join(files)}: none of {len(found)} {complaint}; give others")
    conversations = f"{sum(shown.values())} of {sum(map(len, found.values()))}"
    ranks.print(f"Demonstrations: {conversations} are right, on {len(places)} of {len(questions)} questions.")

    def script(example: Example, sample: int) -> list[str]:
        turns = right_turns(example)
        return turns[sample % len(turns)]

    if isinstance(questions, Dataset):
        questions.keep(places)
        return questions, script
    return [questions[place] for place in places], script


def is_right(said: Sequence[str], example: Example, chat: Chat, rule: RewardRule) -> bool:
    """Whether the last of these turns ends a conversation with the right answer."""
    if not said or chat.parse(said[-1]).name != ANSWER:
        return False
    episode = Episode(example, 0, 0, turns=[Turn("assistant", said[-1], 0, 0)], status=ANSWERED)
    return answer_score(episode, rule) == 1


def open_teacher(config: Config, chat: Chat, toolbox: Toolbox) -> Teacher:
    """The model that --teacher names; it writes the turns when they are asked for."""
    from mmsr.data.teacher import ANSWER_TOKENS, Teacher
    from mmsr.net.completions import open_server

    server = open_server(config.teacher, config.teacher_model)
    complete = partial(server.complete, max_tokens=ANSWER_TOKENS)
    kept = Path(config.out) / "teacher.jsonl"
    return Teacher(complete, config.teacher_model, kept, chat, toolbox, rollout_limits(config))
