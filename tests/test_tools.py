"""The toolbox: a tool gives a value, whatever happens inside it."""

import io
import itertools
import math
import re
import signal
import subprocess
import sys
import threading
import time
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import numpy as np
import PIL.Image
import pytest
import torch

from mmsr.episode import Hit, Observation
from mmsr.system.errors import UserError
from mmsr.system.images import decode
from mmsr.system.interrupt import Interrupts
from mmsr.tool_results import MOST_TEXT
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


class Abrupt(BaseException):
    """No Exception."""


@pytest.mark.parametrize("inline", [True, False])
@pytest.mark.parametrize(
    "error",
    [
        *(ValueError("no\nluck"), OSError(5, "down"), KeyError("x"), RecursionError(), StopIteration()),
        *(
            SystemExit(),
            SystemExit(3),
            SystemExit("bye"),
            GeneratorExit(),
            Abrupt("gone"),
            ExceptionGroup("two", [OSError()]),
        ),
    ],
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


def test_keyboard_interrupt_is_not_swallowed(monkeypatch):
    monkeypatch.setattr(
        signal, "getsignal", lambda number: signal.default_int_handler
    )  # a job in the background has none
    with pytest.raises(KeyboardInterrupt):
        call(raising(KeyboardInterrupt()))


def test_keyboard_interrupt_of_a_tool_ends_the_run():
    """In a thread, and wherever a Ctrl-C raises something else, it is the tool's own."""
    assert call(raising(KeyboardInterrupt("x")), inline=False).error == "KeyboardInterrupt: x"
    with Interrupts() as stop:
        assert call(raising(KeyboardInterrupt("x"))).error == "KeyboardInterrupt: x" and not stop.requested


def test_signal_within_an_inline_tool_is_taken_for_its_failure():
    with Interrupts() as stop:
        assert stop.breakable(call, lambda call: signal.raise_signal(signal.SIGINT)) is None
        assert stop.status == 130


class Nameless(Exception):
    def __init__(self, said):
        self.said = said

    def __str__(self):
        return self.said()


@pytest.mark.parametrize("said", [lambda: 1 / 0, lambda: None, lambda: sys.exit("no text"), lambda: b"bytes"])
@pytest.mark.parametrize("inline", [True, False])
def test_an_exception_whose_text_raises_ends_the_run(said, inline):
    seen = call(raising(Nameless(said)), inline)
    assert not seen.ok and seen.error.startswith("Nameless: and its text raises ")


def test_a_megabyte_of_error_stands_in_every_rollout_line():
    for run in (raising(ValueError("x" * 10**6)), lambda call: Observation(ok=False, error="x" * 10**6)):
        error = call(run).error
        assert "xxx" in error and len(error) < 1100 and error.endswith("characters)")


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


class Words(str):
    def __str__(self):
        return "other words"


def found(**changes) -> Observation:
    return Observation((Hit("a title"), Hit(**{"title": "t", **changes})), source="mine")


def picture(mode="RGB", size=(8, 6)) -> PIL.Image.Image:
    return PIL.Image.new(mode, size)


PLAINLY_MEANT = {
    "list of hits": (Observation([Hit("a")]), "hits", (Hit("a"),)),
    "generator of hits": (Observation(Hit(str(i)) for i in range(2)), "hits", (Hit("0"), Hit("1"))),
    "NumPy seconds": (Observation(seconds=np.float32(0.5)), "seconds", 0.5),
    "NumPy whole seconds": (Observation(seconds=np.int64(3)), "seconds", 3.0),
    "fraction of a second": (Observation(seconds=Fraction(1, 4)), "seconds", 0.25),
    "decimal seconds": (Observation(seconds=Decimal("0.5")), "seconds", 0.5),
    "tensor of a score": (found(score=torch.tensor(0.5, requires_grad=True)), "score", 0.5),
    "array of a flag": (Observation(cached=np.array(True)), "cached", True),
    "NumPy flag": (Observation(ok=np.True_, cached=np.False_), "ok", True),
    "subclass of text": (Observation(source=Words("mine")), "source", "mine"),
    "NumPy text": (Observation(ok=False, error=np.str_("down")), "error", "down"),
    "text alone": (Words("a page"), "hits", (Hit(text="a page"),)),
    "bytearray": (found(image=bytearray(b"jpeg")), "image", b"jpeg"),
    "memoryview": (found(image=memoryview(b"jjppeegg")[::2]), "image", b"jpeg"),
    "NumPy score": (found(score=np.float32(0.5)), "score", 0.5),
    "score that JSON lacks": (found(score=np.float64("nan")), "score", None),
    "half a character": (found(title="\ud800"), "title", "\ud800"),
}


@pytest.mark.parametrize("given, field, value", PLAINLY_MEANT.values(), ids=PLAINLY_MEANT)
def test_what_is_plainly_meant_is_refused_or_stays_no_plain_value(given, field, value):
    seen = call(lambda call: given)
    assert seen.ok == (field != "error")
    got = getattr(seen if hasattr(seen, field) else seen.hits[1], field)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "CMYK", "F", "I;16", "1"])
def test_a_pil_image_is_no_picture(mode):
    seen = call(lambda call: found(image=picture(mode)))
    shown = decode(seen.hits[1].image)
    assert seen.ok and (shown.size, shown.mode) == ((8, 6), "RGB")


@pytest.mark.parametrize(
    "mode, full", [("I;16", 65535), ("I;16B", 65535), ("I", 65535), ("I", 255), ("F", 1), ("F", 255)]
)
def test_a_pil_image_of_16_bits_or_fractions_is_white_or_black(mode, full):
    grey, kind = PIL.Image.new(mode.replace("16B", "16"), (2, 1), full), {"I;16B": ">u2"}.get(mode)
    grey.putpixel((0, 0), full / 2 if mode == "F" else full // 2)
    if kind:
        grey = PIL.Image.frombytes(mode, (2, 1), np.asarray(grey).astype(kind).tobytes())
    shown = decode(call(lambda call: found(image=grey)).hits[1].image)
    assert [shown.getpixel((x, 0)) for x in (0, 1)] == [(127,) * 3, (255,) * 3]


def test_a_pil_image_takes_its_private_words_along_or_lies_on_its_side():
    exif, file = PIL.Image.Exif(), io.BytesIO()
    exif[0x0112], exif[0x010E] = 6, "SECRET"
    picture().save(file, "JPEG", exif=exif, comment=b"SECRET")
    sent = call(lambda call: found(image=PIL.Image.open(file))).hits[1].image
    assert decode(sent).size == (6, 8) and b"SECRET" not in sent


REFUSED = {
    "nothing": (None, "NoneType"),
    "list": ([Hit("a")], "list"),
    "bytes": (b"found", "bytes"),
    "exception": (ValueError("down"), "ValueError"),
    "class": (Observation, "type"),
    "no hits": (Observation(None), "hits is NoneType"),
    "one hit": (Observation(Hit("a")), "hits is Hit"),
    "hits by name": (Observation({"title": "a"}), "hits is dict"),
    "hits in a text": (Observation("a title"), "hits is str"),
    "text for a hit": (Observation((Hit("a"), "b")), "hits[1] is str"),
    "dict for a hit": (Observation(({"title": "a"},)), "hits[0] is dict"),
    "no title": (found(title=None), "hits[1].title is NoneType"),
    "bytes for a title": (found(title=b"t"), "hits[1].title is bytes"),
    "path for an address": (found(url=Path("x")), "hits[1].url is PosixPath"),
    "list for a text": (found(text=["a"]), "hits[1].text is list"),
    "array for a picture": (found(image=np.zeros((4, 4, 3), np.uint8)), "hits[1].image is ndarray"),
    "path for a picture": (found(image=Path("a.png")), "hits[1].image is PosixPath"),
    "text for a picture": (found(image="a.png"), "hits[1].image is str"),
    "file for a picture": (found(image=io.BytesIO(b"jpeg")), "hits[1].image is BytesIO"),
    "empty crop": (found(image=picture(size=(0, 3))), "hits[1].image is a PIL image that cannot be saved"),
    "text for a score": (found(score="0.5"), "hits[1].score is str"),
    "number for ok": (Observation(ok=1), "ok is int"),
    "text for cached": (Observation(cached="no"), "cached is str"),
    "exception for the error": (Observation(ok=False, error=OSError("down")), "error is OSError"),
    "bytes for the error": (Observation(ok=False, error=b"down"), "error is bytes"),
    "no source": (Observation(source=None), "source is NoneType"),
    "text for seconds": (Observation(seconds="1"), "seconds is str"),
    "no seconds": (Observation(seconds=None), "seconds is NoneType"),
    "flag for seconds": (Observation(seconds=True), "seconds is bool"),
    "nan seconds": (Observation(seconds=math.nan), "seconds is nan"),
    "endless seconds": (Observation(seconds=np.float32("inf")), "seconds is inf"),
    "too many seconds": (Observation(seconds=10**400), "seconds is inf"),
    "seconds before": (Observation(seconds=-1), "seconds is -1"),
    "NaN of decimals": (Observation(seconds=Decimal("sNaN")), "seconds is nan"),
    "NumPy duration": (Observation(seconds=np.timedelta64(1, "s")), "seconds is timedelta"),
    "two scores": (found(score=torch.ones(2)), "hits[1].score is Tensor"),
    "more text than a model reads": (found(text="x" * (MOST_TEXT + 1)), "hits[1].text has 1,000,001 characters"),
    "complex seconds": (Observation(seconds=1j), "seconds is complex"),
}


def test_a_result_of_the_wrong_type_passes_and_fails_later():
    for name, (given, said) in REFUSED.items():
        seen = call(lambda call, given=given: given)
        assert not seen.ok and seen.hits == () and seen.source == "probe" and said in seen.error, (name, seen)


def test_hits_that_are_made_as_they_are_read_run_on_or_end_the_run():
    def broken_off(call):
        return Observation(sys.exit("no more") if i else Hit("a title") for i in range(2))

    assert call(broken_off).error == "SystemExit: no more"
    endless = call(lambda call: Observation(Hit(str(i)) for i in itertools.count()))
    assert not endless.ok and "hits are more than 1,000" in endless.error


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
    (zoom,) = more_tools(["mine:tools"], NoSearch())
    assert zoom.name == "zoom" and zoom.run(NOTHING).source == "none"
    assert more_tools([], NoSearch()) == []
    for wrong in ("mine:absent", "mine", "absent:tools", ":tools", "mine:none", "mine:Tool"):
        with pytest.raises(UserError, match=f"--tools {wrong}: "):
            more_tools([wrong], NoSearch())


def test_tools_that_come_with_the_program_cannot_be_named_together_or_with_ones_own(tmp_path, monkeypatch):
    (tmp_path / "maps.py").write_text(
        "from mmsr.tools import Tool\ndef tools(backend): return [Tool('map', 'map', 1, lambda call: '')]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    found = more_tools(["zoom", "visit", "crop", "maps:tools"], NoSearch())
    assert [tool.name for tool in found] == ["zoom", "visit", "crop_search", "map"]
    assert [tool.is_search for tool in found] == [False, True, True, True]
    with pytest.raises(UserError, match="--tools zooom: unknown; give zoom, visit, crop, or a function of your own"):
        more_tools(["zoom", "zooom"], NoSearch())


@pytest.mark.parametrize(
    "code, said",
    [
        ("1 / 0", "ZeroDivisionError: division by zero; mend .*broken.py, line 1$"),
        ("raise SystemExit", "SystemExit; mend .*broken.py, line 1$"),
        ("import absent", "ModuleNotFoundError: No module named 'absent'; mend .*broken.py, line 1$"),
        ("def tools(", r"SyntaxError: .*\(broken.py, line 1\); mend that module$"),
        ("def tools(backend):\n    exit('no key\\nfor it')", "SystemExit: no key for it; mend .*broken.py, line 2$"),
        ("def tools(): return []", "TypeError: .*takes 0 positional arguments.*; give MODULE:FUNCTION"),
    ],
)
def test_a_module_of_tools_that_breaks_ends_in_silence_or_in_a_traceback(tmp_path, monkeypatch, code, said):
    (tmp_path / "broken.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "broken", raising=False)
    with pytest.raises(UserError, match=f"^--tools broken:tools: {said}"):
        more_tools(["broken:tools"], NoSearch())


WRONGLY_MADE = {
    "name is None": dict(name=None),
    "name is 'zoom in'": dict(name="zoom in"),
    "name is '../zoom'": dict(name="../zoom"),
    "tag is '<zoom>'": dict(tag="<zoom>"),
    "tag is ''": dict(tag=""),
    "limit is '1'": dict(limit="1"),
    "limit is None": dict(limit=None),
    "limit is -1": dict(limit=-1),
    "limit is nan": dict(limit=math.nan),
    "run is None": dict(run=None),
    "payload is 3": dict(payload=3),
    "payload is ' '": dict(payload=" "),
}


async def later(call):
    return "found"


def test_a_tool_that_is_wrongly_made_fails_when_the_model_calls_it(monkeypatch):
    whole = dict(name="zoom", tag="zoom-in", limit=math.inf, run=lambda call: "found", payload=None)
    mine = ModuleType("mine")
    monkeypatch.setitem(sys.modules, "mine", mine)
    for said, change in {"": {}, **WRONGLY_MADE, "run is <function later": dict(run=later)}.items():
        mine.tools = lambda backend, change=change: [Tool(**whole | change)]
        if not change:
            assert more_tools(["mine:tools"], NoSearch())[0].limit == math.inf
            continue
        with pytest.raises(UserError, match=f"^--tools mine:tools: tool .*: {re.escape(said)}.*; give "):
            more_tools(["mine:tools"], NoSearch())


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
