"""A language model as judge: does an answer say the same as one of the accepted ones?

The judge is any callable from chat messages to a reply. It sees question, accepted answers and the answer, as quoted
JSON, and no picture. Its verdicts are kept on disk by a hash of all that it was asked, so that a run that is started
again asks for nothing twice. A missing answer is wrong without asking. Where the judge fails or its reply holds no
verdict, there is none: that is counted, never taken for right or wrong, not kept, and asked for again next time.
"""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Mapping, Sequence

from mmsr.system.errors import UserError
from mmsr.system.journal import Journal, key_of

PROMPT = Path(__file__).parents[1] / "prompts" / "judge.txt"
AT_ONCE = 16
LAST = 8_000  # characters of a reply that are read: its verdict is at the end

WORD = r"\b(in|not\s+)?correct\b"
NO = r"\b(?:in|not\s+)correct\b"
OR = r"(?:\W*\bor\b\W*(?:verdict\W*)?|[^\w.?]+)"
# Both words as the choices that there are: "Verdict (CORRECT/INCORRECT): INCORRECT", or the prompt's end said again;
# not "INCORRECT" and, in the next line, "Correct answer: Tagus".
CHOICES = re.compile(rf"\bcorrect\b{OR}{NO}(?! +\w)|{NO}{OR}\bcorrect\b(?! +\w|\W?:(?!\W*{WORD}))", re.IGNORECASE)
MARKUP = re.compile(r"[*_` \t]+|\\[a-z]+\{|</?(?!verdict)\w+>")  # **, \boxed{, <answer>
HEADING = re.compile(r"(\bverdict[^\w\n]*)\n\s*", re.IGNORECASE)
LABELLED = re.compile(r".*\bverdict\b(?=\W*[:=]|.*correct)(.*)", re.IGNORECASE)
SUBJECT = r"(?:(?:the|this|that|it|given|model|student|candidate|predicted|answer|response|is|s)\b\W*)*"
SAID = re.compile(  # "CORRECT", "The answer is not correct.", "INCORRECT as …"; not "correct: no", "correct name"
    rf"\W*{SUBJECT}{WORD}(?!\s*[:=?]|\s+(?!because|since|as\b|answer\W*$)\w|\W*(?:part|ish\b))(.*)",
    re.IGNORECASE,
)
AGAIN = re.compile(rf"{WORD}(?!\s+\w|\W?:)", re.IGNORECASE)

Complete = Callable[[list[dict[str, Any]]], str]


class Judge:
    """Verdicts of one model. `name` tells it from other models in `kept`, a JSON lines file of verdicts."""

    def __init__(self, complete: Complete, name: str, kept: Path):
        self.complete, self.name, self.kept = complete, name, Journal(kept)
        self.template = PROMPT.read_text(encoding="utf-8")
        self.failure = ""  # the first, in words

    def __call__(self, lines: Sequence[Mapping[str, Any]]) -> list[bool | None]:
        """The verdict on each of an evaluation's lines ("question", "answers", "answer"); None where there is none.

        Raises UserError where asking on makes no sense (a refused key).
        """
        with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="judge") as pool:
            verdicts = [pool.submit(self._verdict, line) for line in lines]
            try:
                return [verdict.result() for verdict in verdicts]
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _verdict(self, line: Mapping[str, Any]) -> bool | None:
        if not (line["answer"] or "").strip():
            return False
        asked = self._asked(line)

        def ask() -> dict[str, Any]:
            reply = self.complete([{"role": "user", "content": asked}])
            return {"correct": _right(reply), "reply": reply}

        try:
            return self.kept.once(key_of(self.name, asked), ask)["correct"]
        except UserError:
            raise
        except Exception as error:  # whatever a server, or a forker's callable, does: it is no verdict
            self.failure = self.failure or f"{type(error).__name__}: {error}"[:300]
            return None

    def _asked(self, line: Mapping[str, Any]) -> str:
        fields = {name: json.dumps(line[name], ensure_ascii=False) for name in ("question", "answers", "answer")}
        return re.sub(r"\{(\w+)\}", lambda field: fields[field[1]], self.template)


def _right(reply: str) -> bool:
    """What the reply's last line with "verdict" in it says, or its last line of all where that is only the word.

    Raises ValueError where there is no such line, or it does not say one thing.
    """
    text = HEADING.sub(r"\1 ", CHOICES.sub("", MARKUP.sub(" ", reply[-LAST:])))
    lines = [line for line in text.splitlines() if line.strip()]
    alone = SAID.fullmatch(lines[-1]) if lines else None
    if alone and not re.search(r"\w", alone[2]):
        return alone[1] is None
    labelled = [found[1] for line in lines if (found := LABELLED.match(line))]
    said = SAID.fullmatch(labelled[-1]) if labelled else None
    if not said or any(bool(word) != bool(said[1]) for word in AGAIN.findall(said[2])):
        raise ValueError(f"no verdict in the judge's reply {reply[-80:]!r}")
    return said[1] is None
