r"""Tool calls in JSON, as the chat template of Qwen3-VL and of many other models has them (`--grammar hermes`).

The system turn lists the tools with their signatures. A model calls one by an object between two control tokens:

    The flag is not one that I know.
    <tool_call>
    {"name": "text_search", "arguments": {"query": "flag with a golden bird"}}
    </tool_call>

and is told the result between `<tool_response>` and `</tool_response>`, in a turn of the user. Where the tokenizer has
no such control tokens, the same is plain text. The template has no word for the last answer but the turn itself; a
short one that can be compared stands between `<answer>` and `</answer>`, as in the tags of grammar.py.

A turn is to be some words (or thoughts), then one action. Of several actions the last one counts. W stands for words,
C(X) for a call whose object is X. `parse` gives action and query, `well_formed` the last column.

| the model's turn                                                     | action       | query | well-formed |
|----------------------------------------------------------------------|--------------|-------|-----|
| W <answer>Paris</answer>                                             | answer       | Paris | yes |
| W C({"name": "image_search", "arguments": {}})                       | image_search | -     | yes |
| W C({"name": "image_search"})                                        | image_search | -     | yes |
| W C({"name": "text_search", "arguments": {"query": "two\n words"}})  | text_search  | two words | yes |
| W C({"arguments": {"query": "q"}, "name": "text_search"})            | text_search  | q     | yes |
| <answer>Paris</answer>                                               | answer       | Paris | no  |
| C({"name": "image_search", "arguments": {}})                         | image_search | -     | no  |
| W <answer>Paris</answer> Yes.                                        | answer       | Paris | no  |
| W C({"name": "image_search"}) <answer>Paris</answer>                 | answer       | Paris | no  |
| W <answer>Paris</answer> C({"name": "image_search"})                 | image_search | -     | no  |
| W C({"name": "image_search"}) C({"name": "image_search"})            | image_search | -     | no  |
| W C({"name": "image_search", "arguments": {"query": "q"}})           | -            | -     | no  |
| W C({"name": "text_search", "arguments": {"query": " "}})            | -            | -     | no  |
| W C({"name": "text_search", "arguments": {"query": 3}})              | -            | -     | no  |
| W C({"name": "text_search", "arguments": {"query": "q", "n": 3}})    | -            | -     | no  |
| W C({"name": "text_search", "arguments": "q"})                       | -            | -     | no  |
| W C({"name": "web_search", "arguments": {"query": "q"}})             | -            | -     | no  |
| W C({"name": ["text_search"], "arguments": {"query": "q"}})          | -            | -     | no  |
| W C(["text_search"])                                                 | -            | -     | no  |
| W C(text_search)                                                     | -            | -     | no  |
| W C({"name": "text_search", "arguments": {"query": "q"})             | -            | -     | no  |
| W <tool_call> {"name": "image_search"}                               | -            | -     | no  |
| W <answer>Paris                                                      | -            | -     | no  |
| W                                                                    | -            | -     | no  |
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mmsr.grammar import ANSWER, Action
from mmsr.tools import Tool

CALL = "<tool_call>"
CALL_END = "</tool_call>"
RESPONSE = "<tool_response>"
RESPONSE_END = "</tool_response>"
QUERY = "query"  # the argument of a tool that takes one
PAIRS = re.compile(r"<(?P<tag>answer|tool_call)>(?P<inside>(?:(?!</?(?:answer|tool_call)>).)*)</(?P=tag)>", re.DOTALL)
TAG = re.compile(r"</?(?:answer|tool_call)>")


class Hermes:
    """The grammar above. `words` describes the tools: by name a `description`, and a `query` where it takes one."""

    markup = (CALL, CALL_END, RESPONSE, RESPONSE_END)
    sampled = (CALL, CALL_END)
    names = (ANSWER, "tool_call", "tool_response", "tools")

    def __init__(self, tools: Sequence[Tool], words: Mapping[str, Mapping[str, str]]):
        self._tools = {tool.name: tool for tool in tools}
        self._words = words

    def call(self, tool: Tool) -> str:
        """The tool's name: how it is called is in the system turn."""
        return tool.name

    def offer(self, tools: Sequence[Tool]) -> str:
        """The template's words about tools, with a line of JSON for each."""
        if not tools:
            return ""
        signatures = [json.dumps(self._signature(tool), ensure_ascii=False) for tool in tools]
        return OFFER.format(signatures="\n".join(signatures), call=CALL, end=CALL_END)

    def _signature(self, tool: Tool) -> dict[str, Any]:
        """A function as the template is given it."""
        words = self._words.get(tool.name, {})
        arguments = {}
        if tool.payload is None:
            arguments = {QUERY: {"type": "string", "description": words.get(QUERY, "what is looked for")}}
        function = {
            "name": tool.name,
            "description": words.get("description", tool.name),
            "parameters": {"type": "object", "properties": arguments, "required": list(arguments)},
        }
        return {"type": "function", "function": function}

    def framed(self) -> tuple[str, str]:
        """The control tokens around a result, each on its line."""
        return f"{RESPONSE}\n", f"\n{RESPONSE_END}"

    def parse(self, text: str) -> Action:
        """The last answer, or call that can be read."""
        for pair in reversed(list(PAIRS.finditer(text))):
            last = not text[pair.end() :].strip()
            if pair["tag"] == ANSWER:
                return Action(ANSWER, " ".join(pair["inside"].split()), last)
            name, query = self._read(pair["inside"])
            if name:
                return Action(name, query, last)
        return Action()

    def _read(self, inside: str) -> tuple[str, str]:
        """The tool and the query of a call; ("", "") for what is no call of a tool."""
        try:
            called = json.loads(inside)
        except (ValueError, RecursionError):
            return "", ""
        name = called.get("name") if isinstance(called, dict) else None
        tool = self._tools.get(name) if isinstance(name, str) else None
        if tool is None:
            return "", ""
        arguments = called.get("arguments", {})
        if tool.payload is not None:
            return (tool.name, "") if arguments == {} else ("", "")
        query = arguments.get(QUERY) if isinstance(arguments, dict) and len(arguments) == 1 else None
        query = " ".join(query.split()) if isinstance(query, str) else ""
        return (tool.name, query) if query else ("", "")

    def well_formed(self, text: str, thought: bool = False) -> bool:
        """Whether a turn is some words, which may be left out behind thoughts, then one action and nothing after it."""
        tags = TAG.findall(text)
        words = TAG.split(text, maxsplit=1)[0].strip()
        return bool(words or thought) and len(tags) == 2 and self.parse(text).last


# The words of the published chat template.
OFFER = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{signatures}
</tools>

For each function call, return a json object with function name and arguments within {call}{end} XML tags:
{call}
{{"name": <function-name>, "arguments": <args-json-object>}}
{end}"""
