"""Chat completions of any OpenAI-compatible server: a hosted model, or a vLLM, SGLang or Ollama server of the user.

Trap: "compatible" servers differ. Each has its own address for chats, refuses other fields in other words, and has its
own way to say that an answer was withheld, was cut off, or failed although the HTTP status is 200.
"""

from __future__ import annotations

import base64
import json
import os
import re
from typing import Any, Callable, Sequence
from urllib.parse import urlsplit

from mmsr.net.client import Client, Refusal, host_of, join_url
from mmsr.net.http import Response, environment_key, failure, keep_secret, proxy_for
from mmsr.net.server_errors import error_text, json_or_none, status_in_body
from mmsr.system.credentials import refuse_credentials
from mmsr.system.images import media_type, without_metadata
from mmsr.system.journal import key_of

OPENAI = "OPENAI_API_KEY"

# Fields that some chat servers refuse. The wording varies, so an error that names a field counts as its refusal, except
# for the number of tokens: that is also named where the conversation is too long, and renaming does not help there.
RENAMED = "max_completion_tokens"  # the name of max_tokens in newer servers
OPTIONAL = ("chat_template_kwargs", "temperature", "max_tokens", RENAMED)
FOREIGN = (
    r"un(supported|recogni[sz]ed|known|expected)|not? (longer )?(supported|permitted|allowed)|extra|deprecated|instead"
)
SIZE = r"too (large|long|big|high|many)|context|maximum|at most|exceed|less than|between|must be"
WITHHELD = re.compile(
    "content.?(filter|policy)|sensitive|safety|prohibited|blocklist|recitation|refusal|guardrail", re.IGNORECASE
)
CUT_OFF = ("length", "max_tokens", "model_length")
ABORTED = ("error", "network_error", "insufficient_system_resource", "abort")  # after these, another try may succeed
THOUGHT = re.compile(r"[<◁](think(?:ing)?)[>▷].*?([<◁]/\1[>▷]|$)", re.DOTALL)
THOUGHT_ENDS = re.compile(r"[<◁]/think(?:ing)?[>▷]")


def picture_part(data: bytes) -> dict[str, Any]:
    """A picture file, without its metadata, as a part of a chat message's content. ValueError for another file."""
    data = without_metadata(data)
    url = f"data:{media_type(data)};base64,{base64.b64encode(data).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def open_server(address: str, model: str, variable: str = OPENAI) -> ChatServer:
    """A server named on the command line, with the key in an environment variable where that is set. Its calls are not
    counted. An answer that was cut off is a failure, because half of a turn or of a judgement is of no use."""
    return ChatServer(address, model, environment_key(variable), Client(), whole=True)


def judge_variable() -> str:
    """The environment variable with a judge's key: its own where that is set, even to nothing; else OpenAI's."""
    return "JUDGE_API_KEY" if "JUDGE_API_KEY" in os.environ else OPENAI


def chat_address(address: str) -> str:
    """The address for chat completions; `address` may be the host alone, the base of its API, or already that address.
    Only a bare host gets /v1, because https://open.bigmodel.cn/api/paas/v4 has its version elsewhere. A query stays."""
    path = urlsplit(address).path.rstrip("/")
    if path.endswith("/chat/completions"):
        return join_url(address, "")
    return join_url(address, "/chat/completions" if path else "/v1/chat/completions")


class ChatServer:
    """A model behind any OpenAI-compatible server. Safe in any number of threads.

    `base_url` is any address that `chat_address` takes. Without a `key` nothing has to be paid, and `spend` is not
    called. A request that is sent twice has the same Idempotency-Key, so that servers which support it charge once.
    With `whole`, an answer that was cut off at the token limit is a failure. Raises UserError for an address with a
    password in it, and for a proxy that cannot be used.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        key: str,
        client: Client,
        seconds: float = 240.0,
        spend: Callable[[str], None] | None = None,
        provider: str = "",
        whole: bool = False,
    ):
        refuse_credentials("the chat server", base_url, "OPENAI_API_KEY")
        proxy_for(base_url)  # raises here, not only at the first call
        self.url = chat_address(base_url.strip())
        self.key = keep_secret(key)
        self.model, self.client, self.seconds, self.whole = model, client, seconds, whole
        self.spend = spend if self.key else None
        self.provider = provider or host_of(self.url)
        self.refused_fields: frozenset[str] = frozenset()  # by this server, so far
        self.headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        if self.key and "api-version=" in urlsplit(self.url).query:  # Azure reads the key from this header
            self.headers["api-key"] = self.key

    def complete(self, messages: Sequence[dict], max_tokens: int) -> str:
        """The answer's text without the model's thoughts. Raises ToolFailure: "format" where no answer is left,
        "blocked" where a filter or the model itself withheld it."""
        body: dict[str, Any] = {"model": self.model, "messages": list(messages), "max_tokens": max_tokens}
        body |= {"temperature": 0.0, "chat_template_kwargs": {"enable_thinking": False}}
        return self._answer(self._ask(body).json(), max_tokens)

    def _answer(self, reply: dict[str, Any], max_tokens: int) -> str:
        message, finish = _choice(reply)
        text = _text(message.get("content"))
        who = f"{self.provider}: {self.model}"
        if WITHHELD.search(finish) or not text and message.get("refusal"):
            raise failure("blocked", f"{who} withheld its answer: {message.get('refusal') or finish}")
        # Where the chat template opens the thought, the answer contains only the end tag.
        answer = THOUGHT_ENDS.split(THOUGHT.sub("", text or ""))[-1].strip()
        if finish.lower() in CUT_OFF and (self.whole or not answer):
            raise failure("format", f"{who} gave no {'whole ' * bool(answer)}answer in {max_tokens} tokens")
        if answer:
            return answer
        if any(message.get(name) for name in ("reasoning_content", "reasoning")):
            raise failure("format", f"{who} gave thoughts and no answer")
        if text is None:
            raise failure("format", f"{self.provider}: no answer in it: {error_text(json.dumps(reply).encode())}")
        raise failure("format", f"{who} gave no answer")

    def _ask(self, body: dict[str, Any]) -> Response:
        """Send the request; again without the fields that the server refuses. After a success these stay left out."""
        left_out = self.refused_fields
        while True:
            content = {name: value for name, value in body.items() if name not in left_out}
            if "max_tokens" in left_out and RENAMED not in left_out:
                content[RENAMED] = body["max_tokens"]
            headers = self.headers | {"Idempotency-Key": key_of(self.url, content)}
            try:
                answer = self.client.request(
                    self.provider, "POST", self.url, headers=headers, json=content, seconds=self.seconds, tries=3,
                    spend=self.spend, status_of=_chat_status,
                )  # fmt: skip
            except Refusal as refusal:
                named = _refused_fields(refusal, content)
                if not named:
                    raise
                left_out |= named
            else:
                self.refused_fields |= left_out
                return answer


def _refused_fields(refusal: Refusal, content: dict[str, Any]) -> set[str]:
    """The optional fields of a request that the refusal names."""
    if refusal.kind != "status":
        return set()
    text = json.dumps(json_or_none(refusal.body), ensure_ascii=False) + refusal.message  # with JSON escapes decoded
    text = text.replace("enable_thinking", "chat_template_kwargs")  # the only key in that field
    named = {name for name in OPTIONAL if name in content and re.search(rf"(?<![a-z_]){name}(?![a-z_])", text)}
    if re.search(SIZE, text, re.IGNORECASE) and not re.search(FOREIGN, text, re.IGNORECASE):
        named -= {"max_tokens", RENAMED}
    return named


def _chat_status(reply: dict[str, Any]) -> int:
    """The status that a 200 reply means: its error's, or 503 where the generation was aborted."""
    status = status_in_body(reply)
    return 503 if status == 200 and _choice(reply)[1] in ABORTED else status


def _choice(reply: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Message and finish_reason of the first choice; {} and "" where they are missing."""
    choices = reply.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(choice, dict):
        return {}, ""
    message = choice.get("message")
    return message if isinstance(message, dict) else {}, str(choice.get("finish_reason") or "")


def _text(content: Any) -> str | None:
    """The text of a message's content, which is a text or a list of parts (texts, thoughts); None for anything else."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return None
    parts = [part for part in content if isinstance(part, dict) and part.get("type", "text") in ("text", "output_text")]
    texts = [part["text"] for part in parts if isinstance(part.get("text"), str)]
    return "".join(texts) if texts else None
