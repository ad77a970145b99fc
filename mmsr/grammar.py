r"""The action grammar: what a turn of the model asks for, and whether it has the form that is wanted.

`Tags` is MMSearch-R1's. A turn is to be one reason, then one action: a tag pair with no other action tag inside. Of
several actions the last one outside closed reasons counts. R stands for `<reason>why</reason>`. `parse` gives action
and query, `well_formed` the last column.

| the model's turn                                            | action       | query     | well-formed |
|-------------------------------------------------------------|--------------|-----------|-------------|
| R <answer>Tagus River</answer>                              | answer       | Tagus River | yes |
| R <search><img></search>                                    | image_search | -         | yes |
| R <text_search>bridge lisbon</text_search>                  | text_search  | bridge lisbon | yes |
| \n R\n<text_search>\n two\n lines </text_search> \n         | text_search  | two lines | yes |
| R <search> < img >\n</search>                               | image_search | -         | yes |
| R so: <answer>Paris</answer>                                | answer       | Paris     | yes |
| R <answer> </answer>                                        | answer       | -         | yes |
| R <search>a bridge</search>                                 | -            | -         | no  |
| R <text_search> \n</text_search>                            | -            | -         | no  |
| R <answer>Paris                                             | -            | -         | no  |
| R <answer>Paris</search>                                    | -            | -         | no  |
| R <ANSWER>Paris</ANSWER>                                    | -            | -         | no  |
| R Paris                                                     | -            | -         | no  |
| <reason>or <answer>Rome</answer></reason>                   | -            | -         | no  |
| <reason>or <answer>Rome</answer></reason><answer>Paris</answer> | answer   | Paris     | no  |
| <reason>or <answer>Rome</reason><answer>Paris</answer>      | answer       | Paris     | no  |
| <reason>why <answer>Paris</answer>                          | answer       | Paris     | no  |
| <answer>Paris</answer>                                      | answer       | Paris     | no  |
| <answer>Paris</answer> R                                    | answer       | Paris     | no  |
| Well: R <answer>Paris</answer>                              | answer       | Paris     | no  |
| R R <answer>Paris</answer>                                  | answer       | Paris     | no  |
| R <answer>Paris</answer> Yes.                               | answer       | Paris     | no  |
| R <text_search>q</text_search> <answer>Paris</answer>       | answer       | Paris     | no  |
| R <answer>Paris</answer> <search><img></search>             | image_search | -         | no  |
| R <text_search>q</text_search> <search>q</search>           | text_search  | q         | no  |
| R <answer>Rome <answer>Paris</answer>                       | answer       | Paris     | no  |
| R <answer>see <search><img></search></answer>               | image_search | -         | no  |
| R </search> <answer>Paris</answer>                          | answer       | Paris     | no  |
| R <ans<reason></reason>wer>Paris</answer>                   | -            | -         | no  |
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from mmsr.tools import Tool

ANSWER = "answer"
REASON = "<reason>"
REASON_END = "</reason>"


@dataclass(frozen=True)
class Action:
    """What a model turn asks for: "answer", a tool's name, or None where no action can be read."""

    name: str | None = None
    query: str = ""  # the words of the answer or query, blanks collapsed; "" for a tool with a fixed payload
    last: bool = False  # only blanks come after it


class Grammar(Protocol):
    """How a model asks for tools, and how it is told that it can, and what came of it.

    Texts may have control tokens in them by their names: those of `markup`.
    """

    markup: Sequence[str]  # the grammar's control tokens
    sampled: Sequence[str]  # of them, those that the model writes
    names: Sequence[str]  # of tags, which untrusted text may not have

    def call(self, tool: Tool) -> str:
        """How prompts say that a tool is called."""

    def offer(self, tools: Sequence[Tool]) -> str:
        """What the system turn says of the tools; "" where the user's turn says it."""

    def framed(self) -> tuple[str, str]:
        """The text before and after the result of a tool, within its turn."""

    def parse(self, text: str) -> Action:
        """The action of a model turn, given as its text without the stop token and without thoughts. Never raises."""

    def well_formed(self, text: str, thought: bool = False) -> bool:
        """Whether a turn has the form that earns the format reward. `thought`: it comes behind thoughts."""


class Tags:
    """MMSearch-R1's grammar. See the table above."""

    markup = ()
    sampled = ()

    def __init__(self, tools: Sequence[Tool]):
        self._tools = {tool.tag: tool for tool in tools}
        payloads = " ".join(tool.payload or "" for tool in tools)
        payload_tags = re.findall(r"<(\w+)", payloads)
        self.names = ["reason", ANSWER, "information", *self._tools, *payload_tags]
        action_tags = "|".join(map(re.escape, [ANSWER, *self._tools]))
        no_tag = rf"(?:(?!</?(?:{action_tags})>).)*"
        self._action = re.compile(rf"<(?P<tag>{action_tags})>(?P<inside>{no_tag})</(?P=tag)>", re.DOTALL)
        self._tag = re.compile(f"</?(?:reason|{action_tags})>")

    def call(self, tool: Tool) -> str:
        """The tool's tags, with its payload or the word query between them."""
        return f"<{tool.tag}>{tool.payload or 'query'}</{tool.tag}>"

    def offer(self, tools: Sequence[Tool]) -> str:
        """Nothing: the prompts describe the tools."""
        return ""

    def framed(self) -> tuple[str, str]:
        """Nothing: the prompts have the tags around results."""
        return "", ""

    def parse(self, text: str) -> Action:
        """The last tag pair outside closed reasons."""
        pairs = list(self._action.finditer(_blank_reasons(text)))
        for pair in reversed(pairs):
            inside = " ".join(pair["inside"].split())
            last = not text[pair.end() :].strip()
            if pair["tag"] == ANSWER:
                return Action(ANSWER, inside, last)
            tool = self._tools[pair["tag"]]
            if tool.payload is None and inside:
                return Action(tool.name, inside, last)
            if tool.payload is not None and _without_blanks(inside) == _without_blanks(tool.payload):
                return Action(tool.name, "", last)
        return Action()

    def well_formed(self, text: str, thought: bool = False) -> bool:
        """Whether a turn is one reason, then one action, and nothing before or after them, `thought` or not."""
        tags = self._tag.findall(text)
        if tags.count(REASON) != 1 or tags.count(REASON_END) != 1:
            return False
        if not text.lstrip().startswith(REASON):
            return False
        # The action that `parse` finds is one pair of tags. With four tags in all, there is no other.
        return len(tags) == 4 and self.parse(text).last


def _blank_reasons(text: str) -> str:
    """Closed reasons replaced by as many blanks: where one was removed, two halves could join into a tag.

    This looks at each place once. A regular expression would look for the end from every `<reason>`: seconds for a
    turn that opens thousands and closes none.
    """
    pieces = []
    done = 0  # everything before is in `pieces`
    start = text.find(REASON)
    while start >= 0:
        end = text.find(REASON_END, start)
        if end < 0:
            break
        end += len(REASON_END)
        pieces.append(text[done:start])
        pieces.append(" " * (end - start))
        done = end
        start = text.find(REASON, done)
    pieces.append(text[done:])
    return "".join(pieces)


def _without_blanks(text: str) -> str:
    return "".join(text.split())
