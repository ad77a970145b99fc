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

from .episode import UserError
from .kept import Kept, key_of

PROMPT = Path(__file__).parent / "prompts" / "judge.txt"
VERDICT = re.compile(r"verdict\W*(correct|incorrect)\b", re.IGNORECASE)
AT_ONCE = 16

Complete = Callable[[list[dict[str, Any]]], str]


class Judge:
    """Verdicts of one model. `name` tells it from other models in `kept`, a JSON lines file of verdicts."""

    def __init__(self, complete: Complete, name: str, kept: Path):
        self.complete, self.name, self.kept = complete, name, Kept(kept)
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
    """The reply's last verdict. Raises ValueError where there is none."""
    found = VERDICT.findall(reply) or re.findall(r"^\W*(correct|incorrect)\W*$", reply, re.IGNORECASE)
    if not found:
        raise ValueError(f"no verdict in the judge's reply {reply[-80:]!r}")
    return found[-1].lower() == "correct"
