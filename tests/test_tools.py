"""The toolbox: a tool gives a value, whatever happens inside it."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mmsr.episode import Hit, Observation, UserError
from mmsr.tools import IMAGE_SEARCH, TEXT_SEARCH, Call, NoSearch, Tool, Toolbox, ToolFailure, more_tools, search_tools

SECONDS = 30
NOTHING = Call("", b"", "")


def tool(run, limit=1) -> Tool:
    return Tool("probe", "probe", limit, run)


def call(run, inline=True, query="q", image=b"bytes") -> Observation:
    return Toolbox([tool(run)], inline).call("probe", Call(query, image, "who?")).result(SECONDS)


def raising(error):
    def run(call):
        raise error

    return run


@pytest.mark.parametrize("inline", [True, False])
@pytest.mark.parametrize(
    "error", [ValueError("no\nluck"), OSError(5, "down"), KeyError("x"), RecursionError(), StopIteration()]
)
def test_exception_becomes_a_failed_observation(inline, error):
    seen = call(raising(error), inline)
    assert not seen.ok and seen.hits == () and seen.source == "probe"
    assert seen.error.startswith(type(error).__name__) and str(error) in seen.error


def test_kind_of_a_failure_is_not_lost_on_the_way_to_the_model_and_the_log():
    seen = call(raising(ToolFailure("rate", "429 of the engine")))
    assert not seen.ok and seen.error == "rate: 429 of the engine"


@pytest.mark.parametrize("inline", [True, False])
def test_an_error_of_who_looks_at_a_result_leaves_the_caller_waiting(inline):
    def then(seen):
        raise MemoryError(seen.source)

    with pytest.raises(MemoryError, match="probe"):
        Toolbox([tool(lambda call: "found")], inline).call("probe", NOTHING, then).result(SECONDS)


def test_keyboard_interrupt_is_not_swallowed():
    with pytest.raises(KeyboardInterrupt):
        call(raising(KeyboardInterrupt()))


@pytest.mark.parametrize("inline", [True, False])
def test_text_becomes_one_hit(inline):
    seen = call(lambda call: f"{call.query} {len(call.image)}", inline)
    assert seen.ok and seen.hits == (Hit(text="q 5"),) and seen.source == "probe"


def test_observation_comes_through_unchanged_but_for_its_seconds():
    given = Observation((Hit("t", "u", "x", b"i", 0.5),), False, "half of it", "somewhere", 0.0, True)
    seen = call(lambda call: given)
    assert seen.seconds > 0
    assert (seen.hits, seen.ok, seen.error, seen.source, seen.cached) == (
        given.hits,
        False,
        "half of it",
        "somewhere",
        True,
    )


def test_seconds_are_measured_of_failures_too_and_the_tools_own_stand():
    def slow(call):
        time.sleep(0.02)
        raise ValueError

    assert call(slow).seconds >= 0.02
    assert call(lambda call: Observation(seconds=7.5)).seconds == 7.5


def test_tools_in_threads_run_at_the_same_time():
    both = threading.Barrier(2)

    def run(call):
        both.wait(SECONDS)
        return call.query

    box = Toolbox([tool(run)], inline=False)
    calls = [box.call("probe", Call(query, b"", "")) for query in "ab"]
    assert [each.result(SECONDS).hits[0].text for each in calls] == ["a", "b"]


def test_inline_tool_has_run_when_call_returns():
    caller = []
    future = Toolbox([tool(lambda call: caller.append(threading.current_thread()) or "")], inline=True).call(
        "probe", NOTHING
    )
    assert future.done() and caller == [threading.current_thread()]


def test_limits_are_the_rollouts_affair():
    box = Toolbox([tool(lambda call: "fine", limit=0)], inline=True)
    assert all(box.call("probe", NOTHING).result().ok for _ in range(3))


def test_search_tools_hand_over_the_picture_and_question_or_the_query_alone():
    class Web:
        def image_search(self, *given):
            return repr(given)

        def text_search(self, *given):
            return repr(given)

    image, text = search_tools(Web(), 1, 2)
    assert (image.name, image.tag, image.limit, image.payload) == (IMAGE_SEARCH, "search", 1, "<img>")
    assert (text.name, text.tag, text.limit, text.payload) == (TEXT_SEARCH, "text_search", 2, None)
    call = Call("query", b"picture", "who?", "https://x.example/")
    assert image.run(call) == repr((b"picture", "who?", "https://x.example/"))
    assert text.run(call) == repr(("query",))


def test_no_search_finds_nothing_and_does_not_fail():
    for seen in (NoSearch().image_search(b"", "who?"), NoSearch().text_search("q")):
        assert seen.ok and not seen.hits and seen.source == "none"


def test_function_that_is_named_makes_tools_of_the_search_engine(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from mmsr.tools import Tool\n"
        "def tools(backend): return [Tool('zoom', 'zoom', 1, lambda call: backend.text_search(call.query))]\n"
        "def none(backend): return None\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    (zoom,) = more_tools("mine:tools", NoSearch())
    assert zoom.name == "zoom" and zoom.run(NOTHING).source == "none"
    assert more_tools("", NoSearch()) == []
    for wrong in ("mine:absent", "mine", "absent:tools", ":tools", "mine:none"):
        with pytest.raises(UserError, match=f"--tools {wrong}: "):
            more_tools(wrong, NoSearch())


def test_error_within_a_module_of_tools_is_shown_as_it_is(tmp_path, monkeypatch):
    """A forker's bug must not read as a wrong option."""
    (tmp_path / "broken.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ZeroDivisionError):
        more_tools("broken:tools", NoSearch())


def test_a_program_that_is_done_waits_for_a_tool_that_hangs():
    script = """
import threading
from mmsr.tools import Call, Tool, Toolbox
begun = threading.Event()
box = Toolbox([Tool("probe", "probe", 1, lambda call: begun.set() or threading.Event().wait())], inline=False)
box.call("probe", Call("q", b"", ""))
begun.wait()
"""
    root = Path(__file__).parent.parent
    subprocess.run([sys.executable, "-c", script], cwd=root, check=True, timeout=SECONDS)
