"""A language model as judge: does an answer say the same as one of the accepted ones?

The judge is any callable from chat messages to a reply. It gets the question, the accepted answers and the answer, as
JSON, but no picture. Verdicts are kept on disk by a hash of the whole request, so that an evaluation that is started
again asks nothing twice. A missing answer is wrong without asking. Where the judge fails, or its reply contains no
verdict, there is no verdict: that is counted, is neither right nor wrong, and is asked again the next time.
"""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Callable, Mapping, Sequence

from mmsr.system.errors import UserError
from mmsr.system.journal import Journal, key_of
from mmsr.system.progress import progress

PROMPT = Path(__file__).parents[1] / "prompts" / "judge.txt"
AT_ONCE = 16
JUDGE_TOKENS = 1024  # of a reply
LAST = 8_000  # characters at the end of a reply that are read

WORD = r"\b(in|not\s+)?correct\b"
NO = r"\b(?:in|not\s+)correct\b"
OR = r"(?:\W*\bor\b\W*(?:verdict\W*)?|[^\w.?]+)"
# Both words as choices: "Verdict (CORRECT/INCORRECT): INCORRECT", or the end of the prompt repeated; not "INCORRECT"
# followed, in the next line, by "Correct answer: Tagus".
CHOICES = re.compile(rf"\bcorrect\b{OR}{NO}(?! +\w)|{NO}{OR}\bcorrect\b(?! +\w|\W?:(?!\W*{WORD}))", re.IGNORECASE)
MARKUP = re.compile(r"[*_` \t]+|\\[a-z]+\{|</?(?!verdict)\w+>")  # **, \boxed{, <answer>
HEADING = re.compile(r"(\bverdict[^\w\n]*)\n\s*", re.IGNORECASE)
LABELLED = re.compile(r".*\bverdict\b(?=\W*[:=]|.*correct)(.*)", re.IGNORECASE)
SUBJECT = r"(?:(?:the|this|that|it|given|model|student|candidate|predicted|answer|response|is|s)\b\W*)*"
VERDICT = re.compile(  # "CORRECT", "The answer is not correct.", "INCORRECT as …"; not "correct: no", "correct name"
    rf"\W*{SUBJECT}{WORD}(?!\s*[:=?]|\s+(?!because|since|as\b|answer\W*$)\w|\W*(?:part|ish\b))(.*)", re.IGNORECASE
)
AGAIN = re.compile(rf"{WORD}(?!\s+\w|\W?:)", re.IGNORECASE)

Complete = Callable[[list[dict[str, Any]]], str]


class Judge:
    """Verdicts of one model. `name` distinguishes it from other models in `journal`, a JSON lines file of verdicts.
    `shown`: with a progress bar."""

    def __init__(self, complete: Complete, name: str, journal: Path, shown: bool = True):
        self.complete, self.name, self.journal, self.shown = complete, name, Journal(journal), shown
        self.template = PROMPT.read_text(encoding="utf-8")
        self.failure = ""  # the first one's text

    def __call__(self, lines: Sequence[Mapping[str, Any]]) -> list[bool | None]:
        """The verdict on each of an evaluation's lines ("question", "answers", "answer"): right, wrong or None. Raises
        UserError where no further call can succeed (a refused key)."""
        pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="judge")
        try:
            verdicts = [pool.submit(self._verdict, line) for line in lines]
            with progress("judging", len(verdicts), "answer", shown=self.shown) as bar:
                for verdict in as_completed(verdicts):
                    verdict.result()  # raises now what ends all
                    bar.update()
            return [verdict.result() for verdict in verdicts]
        finally:  # who is interrupted does not wait for the calls that are being made
            pool.shutdown(wait=False, cancel_futures=True)

    def _verdict(self, line: Mapping[str, Any]) -> bool | None:
        if not (line["answer"] or "").strip():
            return False
        fields = {name: json.dumps(line[name], ensure_ascii=False) for name in ("question", "answers", "answer")}
        prompt = re.sub(r"\{(\w+)\}", lambda field: fields[field[1]], self.template)

        def ask() -> dict[str, Any]:
            reply = self.complete([{"role": "user", "content": prompt}])
            return {"correct": _right(reply), "reply": reply}

        try:
            return self.journal.once(key_of(self.name, prompt), ask)["correct"]
        except UserError:
            raise
        except Exception as error:  # the callable may be anybody's, and may raise anything
            self.failure = self.failure or f"{type(error).__name__}: {error}"[:300]
            return None


def _right(reply: str) -> bool:
    """Whether the reply says "correct": in its last line, if that is only the verdict, else in the last line that
    contains the word "verdict". Raises ValueError where there is no such line, or it contradicts itself."""
    text = HEADING.sub(r"\1 ", CHOICES.sub("", MARKUP.sub(" ", reply[-LAST:])))
    lines = [line for line in text.splitlines() if line.strip()]
    alone = VERDICT.fullmatch(lines[-1]) if lines else None
    if alone and not re.search(r"\w", alone[2]):
        return alone[1] is None
    matches = [LABELLED.match(line) for line in lines]
    labelled = [match[1] for match in matches if match]
    verdict = VERDICT.fullmatch(labelled[-1]) if labelled else None
    if not verdict or any(bool(word) != bool(verdict[1]) for word in AGAIN.findall(verdict[2])):
        raise ValueError(f"no verdict in the judge's reply {reply[-80:]!r}")
    return verdict[1] is None
