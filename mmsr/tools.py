"""The tool interface: what a rollout may call, and the toolbox that calls it.

A tool is a name, a tag, a limit and a function. The model writes `<tag>query</tag>`, or calls it by name (hermes.py).
The function gets a `Call`: the query, the picture as bytes and the question, but not the accepted answers, so it cannot
cheat. It returns an `Observation`, or text, which becomes one. Any exception, `sys.exit()` included, becomes a failed
observation, and so does a result of another type (`tool_results.py`): a tool never ends a rollout.

A search engine is a `Backend`: two methods, behind the paper's two tools.
"""

from __future__ import annotations

import importlib
import inspect
import re
import signal
import threading
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue
from typing import Callable, Protocol

from mmsr.episode import Observation
from mmsr.system.errors import UserError
from mmsr.system.interrupt import BrokenOff
from mmsr.tool_results import as_observation, shortened

IMAGE_SEARCH = "image_search"
TEXT_SEARCH = "text_search"
VISIT = "visit"  # a page, by its address (more_tools/visit.py)
SHIPPED = {name: f"mmsr.more_tools.{name}:tools" for name in ("zoom", "visit", "crop")}  # for --tools


class ToolFailure(Exception):
    """A tool's infrastructure failed. `kind` is one word for programs (timeout, auth, budget, …)."""

    def __init__(self, kind: str, message: str):
        super().__init__(f"{kind}: {message}")
        self.kind = kind
        self.message = message


@dataclass(frozen=True)
class Call:
    """What a tool gets."""

    query: str  # the words between the tags, or the call's argument
    image: bytes  # the question's picture, an encoded file
    question: str
    image_url: str = ""  # where the picture is on the web, if that is known
    found: tuple[str, ...] = ()  # the addresses of all results that the rollout has had


class Backend(Protocol):
    """A search engine. An observation without hits is an answer. Where its infrastructure fails, a method raises.

    It raises ToolFailure where the kind of failure is known. An engine that knows its pages may have a third method,
    `read_page` (search/pages.py); the tool `visit` reads pages of any other from the web.
    """

    def image_search(self, image: bytes, question: str, image_url: str = "") -> Observation:
        """What is known about a picture, an encoded file. It may also be on the web, at `image_url`.

        `question` may guide a summary, nothing else.
        """

    def text_search(self, query: str) -> Observation:
        """Pages that answer a query."""


@dataclass(frozen=True)
class Tool:
    """One tool."""

    name: str
    tag: str
    limit: int  # calls per episode
    run: Callable[[Call], Observation | str]
    payload: str | None = None  # what has to be between the tags (`<search><img></search>`); None takes any query
    is_search: bool = True  # else its calls cost no penalty, and a rollout's shape is judged without them
    full_size: bool = False  # its pictures are shown as large as the question's, not as thumbnails


def search_tools(backend: Backend, max_images: int, max_texts: int) -> list[Tool]:
    """The paper's two tools over a search engine."""

    def image_search(call: Call) -> Observation:
        return backend.image_search(call.image, call.question, call.image_url)

    def text_search(call: Call) -> Observation:
        return backend.text_search(call.query)

    return [
        Tool(IMAGE_SEARCH, "search", max_images, image_search, payload="<img>"),
        Tool(TEXT_SEARCH, "text_search", max_texts, text_search),
    ]


class NoSearch:
    """The back-end `none`: every search honestly finds nothing."""

    own_pages = True

    def image_search(self, image: bytes, question: str, image_url: str = "") -> Observation:
        return Observation(source="none")

    def text_search(self, query: str) -> Observation:
        return Observation(source="none")

    def read_page(self, address: str) -> Observation:
        return Observation(source="none")


class Toolbox:
    """Calls tools, in threads or (`inline`, for reproducible runs) at once in the caller's thread.

    The threads are daemons, so that a program can end while a tool hangs. A ThreadPoolExecutor would wait for it.
    """

    def __init__(self, tools: list[Tool], inline: bool, workers: int = 64):
        self.tools = {tool.name: tool for tool in tools}
        self.inline = inline
        self.workers = workers  # threads that may still be started
        self.queue: SimpleQueue[tuple[Future[Observation], Callable[[], Observation]]] = SimpleQueue()

    def call(
        self,
        name: str,
        call: Call,
        then: Callable[[Observation], object] = lambda found: None,
    ) -> Future[Observation]:
        """What the tool of this name finds. Before the future is done, `then` gets it, in the tool's thread.

        A tool that hangs keeps `call` and `then` alive while the program runs, so neither may refer to much memory.
        """

        def work() -> Observation:
            found = _observe(self.tools[name], call)
            then(found)
            return found

        done: Future[Observation] = Future()
        if self.inline:
            done.set_result(work())
            return done
        self.queue.put((done, work))
        if self.workers:  # each call starts one more thread, until all are there
            self.workers -= 1
            threading.Thread(target=self._work, name="tool", daemon=True).start()
        return done

    def _work(self) -> None:
        """What each thread does. It has no variables: with one, a waiting thread would keep its last call alive."""
        while True:
            _finish(*self.queue.get())

    def drop(self) -> None:
        """Cancel calls that wait for a thread: they may cost money."""
        with suppress(Empty):
            while True:
                waiting, _ = self.queue.get_nowait()
                waiting.cancel()


def _finish(done: Future[Observation], work: Callable[[], Observation]) -> None:
    """Put what `work` returns or raises into `done`, unless that has been cancelled."""
    if not done.set_running_or_notify_cancel():
        return
    try:
        done.set_result(work())
    except BaseException as error:  # of `then`: no tool raises here
        done.set_exception(error)


def _observe(tool: Tool, call: Call) -> Observation:
    """Call a tool, which may raise and return anything. The rollout must continue."""
    start = time.perf_counter()
    try:
        found = as_observation(tool.name, tool.run(call))
    except BaseException as error:
        _let_through(error)
        found = Observation(ok=False, error=_error_text(error), source=tool.name)
    return replace(found, seconds=found.seconds or time.perf_counter() - start)


# ---- what a tool raises


def _let_through(error: BaseException) -> None:
    """Raise again what a signal raised while a tool ran in the main thread: the user wants to stop, nothing failed.

    Within `Interrupts` a Ctrl-C raises BrokenOff. A KeyboardInterrupt is a Ctrl-C only where Python's own handler is
    in place; anywhere else the tool raised it.
    """
    if isinstance(error, BrokenOff):
        raise error
    in_main_thread = threading.current_thread() is threading.main_thread()
    handled_by_python = in_main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if handled_by_python and isinstance(error, KeyboardInterrupt):
        raise error


def _error_text(error: BaseException) -> str:
    """An exception's type and text; for a ToolFailure, its kind and text. Making the text may raise, too."""
    try:
        text = str(error)
    except BaseException as another:
        _let_through(another)
        return shortened(f"{type(error).__name__}: and its text raises {type(another).__name__}")
    if isinstance(error, ToolFailure):
        return shortened(text)
    return shortened(f"{type(error).__name__}: {text}" if text else type(error).__name__)


# ---- the tools of --tools


def more_tools(names: Sequence[str], backend: Backend) -> list[Tool]:
    """The tools that come with this program, by their names, and those that a function MODULE:FUNCTION makes from the
    search engine.

    Raises UserError where a function cannot be imported or fails, or where its tools could not be called.
    """
    tools = []
    for name in names:
        tools += _made_by(name, backend)
    return tools


def _made_by(name: str, backend: Backend) -> list[Tool]:
    """The tools of one name of --tools. Raises UserError."""
    if ":" not in name and name not in SHIPPED:
        own = "a function of your own as MODULE:FUNCTION"
        raise UserError(f"--tools {name}: unknown; give {', '.join(SHIPPED)}, or {own}")
    module, _, function = SHIPPED.get(name, name).partition(":")
    try:
        tools = getattr(importlib.import_module(module), function)(backend)
    except BaseException as error:
        _let_through(error)
        raise _unusable(name, error) from error
    if not isinstance(tools, list) or not all(isinstance(tool, Tool) for tool in tools):
        kind = type(tools).__name__
        raise UserError(f"--tools {name}: gave {kind}; return a list of Tool from the search engine it gets")
    for tool in tools:
        wrong = _wrongly_made(tool)
        if wrong:
            raise UserError(f"--tools {name}: tool {str(tool.name)[:40]!r}: {wrong}")
    return tools


def _wrongly_made(tool: Tool) -> str:
    """What would only fail, or be ignored, when the model calls the tool. Empty where all is well."""
    for field, value in (("name", tool.name), ("tag", tool.tag)):
        if not isinstance(value, str) or not re.fullmatch(r"[\w-]+", value):
            return f"{field} is {value!r:.40}; give a word of letters, digits, _ and -"
    if not isinstance(tool.limit, int | float) or not tool.limit >= 0:
        return f"limit is {tool.limit!r:.40}; give a number from 0"
    if not callable(tool.run) or inspect.iscoroutinefunction(tool.run):
        return f"run is {tool.run!r:.40}; give a plain function of a Call"
    if tool.payload is not None and not (isinstance(tool.payload, str) and tool.payload.strip()):
        return f"payload is {tool.payload!r:.40}; give text, or None where the model writes a query"
    return ""


def _unusable(name: str, error: BaseException) -> UserError:
    """One line for a --tools function that failed.

    No traceback is shown, so it names the place in the user's module.
    """
    calls = traceback.extract_tb(error.__traceback__)[1:]
    calls = [call for call in calls if "importlib" not in call.filename and "<" not in call.filename]
    advice = "give MODULE:FUNCTION, a function of the search engine that can be imported here"
    if calls:
        line = [call.lineno for call in calls if call.filename == calls[0].filename][-1]
        advice = f"mend {calls[0].filename}, line {line}"
    elif isinstance(error, SyntaxError):  # which says where it is
        advice = "mend that module"
    return UserError(f"--tools {name}: {' '.join(_error_text(error).split())}; {advice}")
