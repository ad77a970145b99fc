"""Chat completions of any OpenAI-compatible server: a hosted model, or vLLM, SGLang, Ollama on a machine of one's own.

Trap: "compatible" is a family of dialects. Where chats are sent, which fields are refused and in what words, how an
answer is withheld or cut off, and where an error hides in a success differ from server to server.
"""

from __future__ import annotations

import base64
import json
import re
from typing import Any, Callable, Sequence
from urllib.parse import urlsplit

from mmsr.net.client import Client, Refusal, host_of, join_url
from mmsr.net.http import Response, environment_key, failure, keep_secret, proxy_for
from mmsr.net.server_errors import error_text, json_or_none, status_in_body
from mmsr.system.credentials import refuse_credentials
from mmsr.system.images import media_type, without_metadata
from mmsr.system.journal import key_of

# What chat servers do not all take. They refuse it in ever new words, so that naming a field is enough, but for the
# number of tokens: it is also named where the conversation is too long, which no other name would mend.
RENAMED = "max_completion_tokens"  # what newer servers call max_tokens
OPTIONAL = ("chat_template_kwargs", "temperature", "max_tokens", RENAMED)
FOREIGN = (
    r"un(supported|recogni[sz]ed|known|expected)|not? (longer )?(supported|permitted|allowed)|extra|deprecated|instead"
)
SIZE = r"too (large|long|big|high|many)|context|maximum|at most|exceed|less than|between|must be"
WITHHELD = re.compile(
    "content.?(filter|policy)|sensitive|safety|prohibited|blocklist|recitation|refusal|guardrail", re.IGNORECASE
)
CUT_OFF = ("length", "max_tokens", "model_length")
BROKEN_OFF = ("error", "network_error", "insufficient_system_resource", "abort")  # reasons to finish that may pass
THOUGHT = re.compile(r"[<◁](think(?:ing)?)[>▷].*?([<◁]/\1[>▷]|$)", re.DOTALL)
THOUGHT_ENDS = re.compile(r"[<◁]/think(?:ing)?[>▷]")


def picture_part(data: bytes) -> dict[str, Any]:
    """A picture file, without its metadata, as a part of a chat message's content. ValueError where it is none."""
    data = without_metadata(data)
    url = f"data:{media_type(data)};base64,{base64.b64encode(data).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def open_server(address: str, model: str) -> ChatServer:
    """A server named on the command line, with OPENAI_API_KEY where that is set; its answers are not counted, and one
    that is cut off is a failure: half a turn is none, and half a judgement may say anything."""
    return ChatServer(address, model, environment_key("OPENAI_API_KEY"), Client(), whole=True)


def chat_address(address: str) -> str:
    """Where an OpenAI-compatible server takes chats: what is named may be its host alone, its API, or the very place.

    Only a bare host gets /v1: https://open.bigmodel.cn/api/paas/v4 has its version elsewhere. A query stays.
    """
    path = urlsplit(address).path.rstrip("/")
    if path.endswith("/chat/completions"):
        return join_url(address, "")
    return join_url(address, "/chat/completions" if path else "/v1/chat/completions")


class ChatServer:
    """A model behind any OpenAI-compatible server. Safe in any number of threads.

    `base_url` is the server's, its API's, or the very place for chats. Without a `key` none is sent and nothing is
    paid: `spend` is then not called. A request that is sent twice bears the same Idempotency-Key: servers that heed it
    charge once. `whole`: an answer that was cut off after its last token is a failure. Raises UserError for an address
    with a password in it, and for a proxy that cannot be used.
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
        proxy_for(base_url)  # refused now, and not at the first call
        self.url, self.whole = chat_address(base_url.strip()), whole
        self.model, self.key, self.client, self.seconds = model, keep_secret(key), client, seconds
        self.spend = spend if self.key else None
        self.provider = provider or host_of(self.url)
        self.foreign: frozenset[str] = frozenset()  # fields that this server has refused
        self.headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        if self.key and "api-version=" in urlsplit(self.url).query:  # Azure's deployments want the key there
            self.headers["api-key"] = self.key

    def complete(self, messages: Sequence[dict], max_tokens: int) -> str:
        """The answer's text, the model's thoughts taken out.

        Raises ToolFailure: "format" where no answer is left, "blocked" where a filter or the model itself withheld it.
        """
        body = {
            "model": self.model,
            "messages": list(messages),
            "max_tokens": max_tokens,
            "temperature": 0.0,
            "chat_template_kwargs": {"enable_thinking": False},
        }
        return self._answer(self._ask(body).json(), max_tokens)

    def _answer(self, reply: dict[str, Any], max_tokens: int) -> str:
        message, finish = _choice(reply)
        text, who = _text(message.get("content")), f"{self.provider}: {self.model}"
        if WITHHELD.search(finish) or not text and message.get("refusal"):
            raise failure("blocked", f"{who} withheld its answer: {message.get('refusal') or finish}")
        answer = THOUGHT_ENDS.split(THOUGHT.sub("", text or ""))[-1].strip()  # a template may have opened the thought
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
        """Post. A field that the server refuses is renamed or left out; what has helped is left out from then on."""
        foreign = self.foreign
        while True:
            wanted = {name: value for name, value in body.items() if name not in foreign}
            if "max_tokens" in foreign and RENAMED not in foreign:
                wanted[RENAMED] = body["max_tokens"]
            headers = self.headers | {"Idempotency-Key": key_of(self.url, wanted)}
            try:
                answer = self.client.request(
                    self.provider, "POST", self.url, headers=headers, json=wanted, seconds=self.seconds, tries=3,
                    spend=self.spend, status_of=_chat_status,
                )  # fmt: skip
            except Refusal as refused:
                named = _refused_fields(refused, wanted)
                if not named:
                    raise
                foreign |= named
            else:
                self.foreign |= foreign
                return answer


def _refused_fields(refused: Refusal, sent: dict[str, Any]) -> set[str]:
    """The optional fields of a request that its refusal names, and that it may do without."""
    if refused.kind != "status":
        return set()
    text = json.dumps(json_or_none(refused.body), ensure_ascii=False) + refused.message  # its escapes are read
    text = text.replace("enable_thinking", "chat_template_kwargs")  # which holds nothing else
    named = {name for name in OPTIONAL if name in sent and re.search(rf"(?<![a-z_]){name}(?![a-z_])", text)}
    if re.search(SIZE, text, re.IGNORECASE) and not re.search(FOREIGN, text, re.IGNORECASE):
        named -= {"max_tokens", RENAMED}
    return named


def _chat_status(reply: dict[str, Any]) -> int:
    status = status_in_body(reply)
    return 503 if status == 200 and _choice(reply)[1] in BROKEN_OFF else status


def _choice(reply: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Message and finish_reason of the first choice; {} and "" where it has none."""
    choices = reply.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(choice, dict):
        return {}, ""
    message = choice.get("message")
    return message if isinstance(message, dict) else {}, str(choice.get("finish_reason") or "")


def _text(content: Any) -> str | None:
    """A message's content, a text or parts of which some are texts (others are thoughts); None where it is neither."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return None
    parts = [part for part in content if isinstance(part, dict) and part.get("type", "text") in ("text", "output_text")]
    texts = [part["text"] for part in parts if isinstance(part.get("text"), str)]
    return "".join(texts) if texts else None
