"""A language model as judge in the reward: it is asked about answers that exact match rejects.

Its "right" makes the accuracy 1. Where it fails there is no verdict, and the rollout takes no part in the update, as
one that a failed tool ended: counted as wrong, it would punish what nobody has judged.

A policy that is trained on verdicts may learn to talk to the judge instead of answering. So two kinds of answers stay
wrong without asking: long ones, for pleas and lists of guesses need room, and those with words of the judge's task that
neither the question nor an accepted answer has.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from mmsr.data.judge import JUDGE_TOKENS, Judge
from mmsr.episode import ANSWERED, JUDGED_RIGHT, JUDGED_WRONG, NOT_ASKED, UNJUDGED, Episode, Example
from mmsr.net.client import FATAL
from mmsr.net.completions import ChatServer
from mmsr.reward import RewardRule, answer_score, given_answer
from mmsr.system.errors import UserError
from mmsr.tools import ToolFailure

ROOM = 100  # characters that an answer may have more than the longest accepted one
TASK = re.compile(r"\b(?:in)?correct|\bverdict|\bgrader|\binstruct|\bignore", re.IGNORECASE)  # beginnings of words


class RewardJudge:
    """Sets `judged` of episodes, by a judge and where the exact match of `rule` says no."""

    def __init__(self, judge: Judge, rule: RewardRule):
        self.judge = judge
        self.rule = rule

    @property
    def failure(self) -> str:
        """Why a verdict failed, the first of the last call's."""
        return self.judge.failure

    def __call__(self, episodes: Sequence[Episode]) -> int:
        """The number of answers that it was asked about. Raises UserError where no further call can succeed."""
        self.judge.failure = ""
        asked = []
        lines = []
        for episode in episodes:
            answer = given_answer(episode, self.rule) or ""
            if episode.status != ANSWERED or not answer.strip() or answer_score(episode, self.rule) == 1:
                continue
            if talks_to_the_judge(answer, episode.example):
                episode.judged = NOT_ASKED
                continue
            asked.append(episode)
            accepted = list(episode.example.answers)
            lines.append({"question": episode.example.question, "answers": accepted, "answer": answer})
        names = {True: JUDGED_RIGHT, False: JUDGED_WRONG, None: UNJUDGED}
        for episode, verdict in zip(asked, self.judge(lines) if lines else ()):
            episode.judged = names[verdict]
        return len(asked)


def talks_to_the_judge(answer: str, example: Example) -> bool:
    """Whether an answer is too long for one, or has words of the judge's task that question and answers lack."""
    if len(answer) > max(map(len, example.answers), default=0) + ROOM:
        return True
    known = " ".join([example.question, *example.answers]).lower()
    return any(word[0].lower() not in known for word in TASK.finditer(answer))


def complete(server: ChatServer) -> Callable[[list[dict]], str]:
    """The function that asks a server's model. It raises UserError after a failure that all later calls would share."""

    def ask(messages: list[dict]) -> str:
        try:
            return server.complete(messages, max_tokens=JUDGE_TOKENS)
        except ToolFailure as error:
            if error.kind in FATAL:
                raise UserError(f"--reward-judge: {error}; mend that and go on with --resume") from None
            raise

    return ask
