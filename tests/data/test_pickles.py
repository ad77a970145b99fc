"""Pickles from strangers: what is plain is read as Python reads it, what is not is refused and does nothing."""

import io
import os
import pickle
import random
import struct
from pathlib import Path

import pytest
from PIL import Image

from mmsr.data import pickles
from mmsr.data.pickles import Inert, read_plain
from mmsr.system.errors import UserError

PLAIN = {
    "text": "Größe \U0001f1ed\U0001f1fa",
    "numbers": [0, -1, 255, 70_000, -(2**40), 2**80, 1.5, float("inf"), True, False, None],
    "bytes": b"\x00\xff" * 500,
    "tuples": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
    "nested": [[], {}, {"a": [{"b": ()}]}, ["same", "same"]],
    3: "a number for a key",
    "long": ["x" * 300, list(range(3000)), {str(i): i for i in range(3000)}],
}


def written(folder: Path, content: bytes) -> Path:
    path = folder / "some.pkl"
    path.write_bytes(content)
    return path


def refused(path: Path, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        read_plain(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and len(message) < 600, message
    assert all(word in message for word in words), message


@pytest.mark.parametrize("protocol", range(3, 6))
def test_plain_values_come_back_otherwise_than_from_python(tmp_path, protocol):
    assert read_plain(written(tmp_path, pickle.dumps(PLAIN, protocol))) == PLAIN


def test_shared_and_circular_containers(tmp_path):
    row = ["shared"]
    row.append(row)
    found = read_plain(written(tmp_path, pickle.dumps([row, row])))
    assert found[0] is found[1] and found[0][1] is found[0]


def test_protocols_from_before_there_were_bytes(tmp_path):
    for protocol in (0, 1, 2):
        values = {"a": [1, "b", 2.5, None, "ü"], "c": {}}
        assert read_plain(written(tmp_path, pickle.dumps(values, protocol))) == values


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA"])
def test_pillows_objects_keep_their_state_and_no_code_of_pillow_runs(tmp_path, monkeypatch, mode):
    picture = Image.effect_noise((9, 7), 50).convert("RGB").convert(mode)
    file = io.BytesIO()
    picture.save(file, "PNG")
    opened = Image.open(io.BytesIO(file.getvalue()))
    content = pickle.dumps([picture, opened])
    monkeypatch.setattr(Image.Image, "__setstate__", lambda *_: pytest.fail("Pillow was called"))
    for found in read_plain(written(tmp_path, content)):
        assert type(found) is Inert and found.state[1:3] == [mode, (9, 7)] and found.state[4] == picture.tobytes()


# ---- attacks


class Calls:
    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


def test_calls_are_made(tmp_path):
    trace = tmp_path / "trace"
    touch = f"touch {trace}"
    attacks = {
        "os.system|posix.system|nt.system": Calls(os.system, touch),
        "builtins.eval": Calls(eval, f"open({str(trace)!r}, 'w')"),
        "builtins.exec": Calls(exec, f"open({str(trace)!r}, 'w')"),
        "subprocess.Popen|commands.Popen": Calls(__import__("subprocess").Popen, ["touch", str(trace)]),
        "builtins.getattr": Calls(getattr, "os", "system"),
    }
    for names, attack in attacks.items():
        hidden = {"fvqa_train_0": {"tool_returned_web_title_list": ["a", [attack]]}}
        for content in (attack, hidden, [Calls(list, attack)], (attack,)):
            for protocol in (0, 2, 4, 5):
                with pytest.raises(UserError) as caught:
                    read_plain(written(tmp_path, pickle.dumps(content, protocol)))
                wanted = str(caught.value).partition("wants ")[2].partition(";")[0]
                assert wanted.replace("__builtin__", "builtins") in [*names.split("|"), "builtins.list"]
    assert not trace.exists()


def test_a_function_under_pillows_name_is_called(tmp_path):
    """PIL.Image holds functions that open files and modules that hold everything: none is looked up."""
    trace = tmp_path / "trace"
    line = f"open({str(trace)!r}, 'w')"
    for name in ("builtins.eval", "os.system", "ImageShow.subprocess.run"):
        program = b"cPIL.Image\n" + name.encode() + b"\nX" + struct.pack("<I", len(line)) + line.encode() + b"\x85R."
        found = read_plain(written(tmp_path, b"\x80\x04" + program))
        assert type(found) is Inert and found.state is None
    assert not trace.exists()
    refused(written(tmp_path, b"\x80\x04cPILfake\nx\n."), "wants PILfake.x")


@pytest.mark.parametrize(
    "program, word",
    [
        (b"(Vtouch trace\nios\nsystem\n.", "INST"),
        (b"(cPIL.Image\nImage\no.", "OBJ"),
        (b"\x80\x02\x82\x01.", "EXT1"),
        (b"Ptouch trace\n.", "PERSID"),
        (b"\x80\x05\x96" + struct.pack("<Q", 3) + b"abc.", "BYTEARRAY8"),
        (b"\x80\x04\x8f.", "EMPTY_SET"),
        (b"]}b.", "beyond plain values"),
        (b"\x80\x02]\x85}\x81.", "beyond plain values"),
        (b"}]K\x01s.", "list for a key"),
        (b"}NK\x01s.", "NoneType for a key"),
        (b"}cPIL.Image\nImage\nK\x01s.", "type for a key"),
    ],
)
def test_instructions_beyond_plain_values_are_run(tmp_path, program, word):
    refused(written(tmp_path, program), word)


def test_state_is_set_on_a_class(tmp_path):
    refused(written(tmp_path, b"\x80\x02cPIL.Image\nImage\n}U\x05stateK\x01sb."), "")
    assert Inert.state is None


# ---- bombs


@pytest.mark.parametrize(
    "program",
    [
        b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"abc.",  # claims 4 EiB of bytes
        b"\x80\x04\x8e" + struct.pack("<Q", 2**36) + b"abc.",
        b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b"abc.",
        b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"abc.",  # a number of 2 GiB
        b"\x80\x02\x8b" + struct.pack("<i", -1) + b".",
        b"L" + b"9" * 10**6 + b"L\n.",
        b"\x80\x04\x95" + struct.pack("<Q", 2**62),
    ],
)
def test_claimed_sizes_are_believed(tmp_path, program):
    refused(written(tmp_path, program), "no pickle, or cut short or damaged")


def test_a_huge_place_in_the_memo_takes_memory(tmp_path):
    assert read_plain(written(tmp_path, b"\x80\x02]r\xfe\xff\xff\xff.")) == []


@pytest.mark.slow
def test_depth_ends_the_process(tmp_path):
    """Tuples in tuples for a key: hashing them recurses in C. Lists in lists: they are freed without recursion."""
    deep = b"\x80\x02)" + b"\x85" * 200_000
    refused(written(tmp_path, b"\x80\x02}" + deep[2:] + b"K\x01s."), "tuple for a key")
    for content in (deep + b".", b"]" * 200_000 + b"a" * 199_999 + b"."):
        read_plain(written(tmp_path, content))
    refused(written(tmp_path, b"(" * 100 + b"."), "in each other")


def test_endless_instructions(tmp_path, monkeypatch):
    monkeypatch.setattr(pickles, "MOST_STEPS", 10_000)
    refused(written(tmp_path, b"]" * 20_000 + b"."), "10,000 instructions")


def test_doubling_is_walked(tmp_path):
    """2^200 leaves, in 200 lists that hold the one before twice; and in tuples that stand for a name."""
    program = b"\x80\x02]q\x00" + b"".join(b"](h\x00h\x00eq\x00" for _ in range(200)) + b"."
    assert len(read_plain(written(tmp_path, program))) == 2
    doubled = b"\x80\x04)" + b"q\x00h\x00\x86" * 60
    for module, kind in ((doubled, b"\x8c\x01x"), (b"\x8c\x02os", doubled[2:]), (b"\x8c\x05PIL.x", doubled[2:])):
        refused(written(tmp_path, module + kind + b"\x93."), "a name that is not text")


MERSENNE = 2**61 - 1  # what Python takes numbers modulo, for a hash


@pytest.mark.parametrize("scale", [MERSENNE, 2**32, 2.0**100], ids=["numbers", "low bits", "floats"])
def test_keys_of_equal_hash_are_looked_up(tmp_path, scale):
    keys = [scale * number for number in range(1, 300)]
    refused(written(tmp_path, pickle.dumps(dict.fromkeys(keys))), "for a key")


def test_an_equal_long_key_is_compared_again_and_again(tmp_path):
    long = b"X" + struct.pack("<I", 2**20) + b"k" * 2**20
    program = b"\x80\x02}" + long + b"K\x01s" + long + b"q\x01" + b"K\x01s" + b"h\x01K\x01s" * 40_000
    refused(written(tmp_path, program + b"."), "or a long one")


# ---- damage


def test_damage_is_a_user_error_or_another_plain_value(tmp_path):
    whole = pickle.dumps({"a": [1.5, "b" * 40, b"c" * 300, (1, 2)], "d": Image.new("RGB", (2, 2))}, 4)
    dice = random.Random(0)
    for cut in range(0, len(whole), 5):
        refused(written(tmp_path, whole[:cut]), "some.pkl")
    for _ in range(1000):
        spoilt = bytearray(whole)
        for _ in range(dice.choice((1, 1, 1, 5))):
            spoilt[dice.randrange(len(spoilt))] = dice.randrange(256)
        try:
            read_plain(written(tmp_path, bytes(spoilt)))
        except UserError as error:
            assert "\n" not in str(error)


def test_files_that_are_no_pickles(tmp_path):
    refused(written(tmp_path, b""), "no pickle")
    refused(written(tmp_path, b"version https://git-lfs.github.com/spec/v1\n"), "")
    refused(written(tmp_path, b"<html>404</html>"), "")
    refused(tmp_path / "absent.pkl", "cannot be read")
    refused(tmp_path, "cannot be read")
