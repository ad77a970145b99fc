"""A run's folder: one process at a time, and nothing of what a run is made of may change under it unnoticed."""

import errno
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from mmsr.config import Config, EvalConfig, in_use
from mmsr.episode import Example
from mmsr.report import folder as runfolder
from mmsr.report.folder import RunFolder
from mmsr.system.errors import UserError
from mmsr.system.files import LOCK, Lock, check_out, code_digest, file_digest, write_whole
from mmsr.system.parallel import SINGLE

ROOT = Path(__file__).parents[2]
QUESTIONS = [Example(f"q{i}", bytes([i]) * 9, f"what is {i} ?", (str(i),), "made") for i in range(3)]


def write(place: Path, name: str, text: str) -> None:
    (place / name).write_text(text)


# ---- two runs in one folder

HOLDER = """import sys, mmsr.system.files as f
lock = f.Lock(f.Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def elsewhere(tmp_path):
    """Another process that holds the folder."""
    line = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def test_two_processes_work_in_one_folder_or_a_dead_one_keeps_it(tmp_path, elsewhere):
    holder = f"process {elsewhere.pid} on {socket.gethostname()}"
    with pytest.raises(UserError) as refused:
        Lock(tmp_path)
    said = str(refused.value)
    assert f"another run is at work in it ({holder}): wait" in said and "\n" not in said
    elsewhere.kill()
    elsewhere.wait()
    Lock(tmp_path).release()
    assert (tmp_path / LOCK).read_bytes() == b"", "a holder that is gone is named"


def test_a_forked_child_keeps_the_folder_of_a_run_that_is_over(tmp_path):
    """Of one that ends, and of one that is killed."""
    script = """
import os, sys, time, mmsr.system.files as f
lock = f.Lock(f.Path(sys.argv[1]))
(up, begun), (never, _) = os.pipe(), os.pipe()
if os.fork() == 0:
    os.close(1)
    os.write(begun, b"1")
    os.read(never, 1)
lock.release() if sys.argv[2] == "ends" else os.read(up, 1)
print("done", flush=True)
os.read(never, 1)
"""
    for how in ("ends", "killed"):
        line = [sys.executable, "-c", script, str(tmp_path), how]
        with subprocess.Popen(line, stdout=subprocess.PIPE, cwd=ROOT, start_new_session=True) as process:
            assert process.stdout.readline() == b"done\n"
            try:
                if how == "killed":
                    process.kill()
                    process.wait()
                Lock(tmp_path).release()
            finally:
                os.killpg(process.pid, signal.SIGKILL)


def test_a_lock_alone_makes_a_folder_one_in_use(tmp_path):
    lock = Lock(tmp_path)
    assert (tmp_path / LOCK).exists() and not in_use(tmp_path)
    lock.release()
    assert not in_use(tmp_path)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_ends_a_run(tmp_path, monkeypatch, capsys, number):
    def flock(*given):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    Lock(tmp_path).check()
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "no locks" in said and "no other run" in said


@pytest.mark.parametrize("change", ["removed", "moved", "replaced", "a file"])
def test_a_folder_removed_under_a_run_is_written_to(tmp_path, change):
    folder = tmp_path / "out"
    folder.mkdir()
    lock = Lock(folder)
    lock.check()
    folder.rename(tmp_path / "kept") if change == "moved" else shutil.rmtree(folder)
    if change == "replaced":
        folder.mkdir()
        _ = Lock(folder)  # of another run
    elif change == "a file":
        folder.write_text("")
    with pytest.raises(UserError, match=f"^--out {folder}: removed, moved or replaced while"):
        lock.check()


def test_a_run_that_was_first_in_an_empty_folder_is_overwritten(tmp_path):
    """Both found it empty and opened their models; the other one has finished by now."""
    with RunFolder(config(tmp_path), SINGLE) as late:
        begin(config(tmp_path), setup(tmp_path))
        with pytest.raises(UserError, match="another run has started in it meanwhile"):
            late.claim()


# ---- what a run is made of


def config(place: Path, kind=Config, **changes):
    given = dict(out=str(place / "out"), model=str(place / "model"), prompts=str(place / "prompts"), search="none")
    return kind(**given | dict(data="q.jsonl" if kind is Config else ("q.jsonl",)) | changes)


def setup(place: Path, **changes) -> SimpleNamespace:
    """Stands for an opened run: its folders are made where they are missing."""
    for name in ("model/config.json", "model/tokenizer.json", "model/model.safetensors", "prompts/user.txt"):
        file = place / name
        file.parent.mkdir(exist_ok=True)
        if not file.exists():
            file.write_text(name)
    chat = SimpleNamespace(turn_start="")
    return SimpleNamespace(config=config(place, **changes), folder=place / "model", world=None, chat=chat)


def begin(config, setup, data=QUESTIONS) -> None:
    """A run begins, or goes on, and ends."""
    with RunFolder(config, SINGLE) as out:
        out.check_inputs(setup, {"--data q.jsonl": data}, str(ROOT / "train.py"))
        out.claim()
        config.save(out.folder)
        out.keep_inputs()


CHANGED = {
    "a row less": (QUESTIONS[:2], "--data q.jsonl has changed (3 questions, now 2 questions)"),
    "other order": (QUESTIONS[::-1], "--data q.jsonl has changed since"),
    "a picture": ([*QUESTIONS[:2], replace(QUESTIONS[2], image=b"other")], "--data q.jsonl has changed since"),
    "an answer": ([*QUESTIONS[:2], replace(QUESTIONS[2], answers=("2", "two"))], "--data q.jsonl has changed since"),
    "a category": ([*QUESTIONS[:2], replace(QUESTIONS[2], category="")], "--data q.jsonl has changed since"),
    "weights": ("model/model.safetensors", "/model/model.safetensors has changed since"),
    "which shards are read": ("model/model.safetensors.index.json", "model.safetensors.index.json has changed (was"),
    "a shard": ("model/model-2.safetensors", "/model/model-2.safetensors has changed (was not there) since"),
    "the model's settings": ("model/config.json", "/model/config.json has changed since"),
    "the tokenizer": ("model/tokenizer.json", "/model/tokenizer.json has changed since"),
    "a prompt": ("prompts/user.txt", "/prompts/user.txt has changed since"),
    "one of the usual prompts": ("prompts/hit.txt", "/prompts/hit.txt has changed since"),
    "what calls in JSON say of a tool": ("prompts/tools.json", "/prompts/tools.json has changed (was not there) since"),
}


@pytest.mark.parametrize("kind", [Config, EvalConfig])
@pytest.mark.parametrize("what, said", CHANGED.values(), ids=CHANGED)
def test_a_run_goes_on_with_other_data_model_or_prompts(tmp_path, kind, what, said):
    same, opened = config(tmp_path, kind), setup(tmp_path, kind=kind)
    begin(same, opened)
    begin(same, opened)
    before = (tmp_path / "out" / "inputs.json").read_bytes()
    if isinstance(what, str):
        write(tmp_path, what, "something else")
    with pytest.raises(UserError) as refused:
        begin(same, opened, QUESTIONS if isinstance(what, str) else what)
    told = str(refused.value)
    assert said in told and "\n" not in told and told.endswith("restore what it was, or name another folder")
    assert (tmp_path / "out" / "inputs.json").read_bytes() == before


def test_a_changed_chat_template_makes_a_resumed_run_think(tmp_path):
    same, opened = config(tmp_path), setup(tmp_path)
    begin(same, opened)
    opened.chat.turn_start = "<think>\n"
    with pytest.raises(UserError, match="how a turn begins, by --thinking and the model's chat template has changed"):
        begin(same, opened)


def test_what_was_touched_or_moved_is_taken_for_changed(tmp_path, capsys):
    begin(config(tmp_path), setup(tmp_path))
    os.utime(tmp_path / "model" / "model.safetensors", (1, 1))
    (tmp_path / "model").rename(tmp_path / "moved")
    (tmp_path / "model").symlink_to(tmp_path / "moved")
    write(tmp_path, "model/README.md", "what the program does not read")
    begin(config(tmp_path), setup(tmp_path))
    assert not capsys.readouterr().err


def test_other_conversations_are_imitated_or_another_toy_world_is_trained_in(tmp_path):
    write(tmp_path, "shown.jsonl", "{}")
    imitating = dict(demonstrations=(str(tmp_path / "shown.jsonl"),), algorithm="sft", group_size=1)
    begin(config(tmp_path, **imitating), setup(tmp_path, **imitating))
    write(tmp_path, "shown.jsonl", "{ }")
    with pytest.raises(UserError, match="--demonstrations .*shown.jsonl has changed"):
        begin(config(tmp_path, **imitating), setup(tmp_path, **imitating))
    opened = setup(tmp_path)
    opened.world = SimpleNamespace(seed=0, settings="mine")
    begin(config(tmp_path, out=str(tmp_path / "toy")), opened)
    opened.world = SimpleNamespace(seed=0, settings="other")
    with pytest.raises(UserError, match="the toy world has changed"):
        begin(config(tmp_path, out=str(tmp_path / "toy")), opened)


def test_a_recording_that_grew_ends_training_or_is_joined_in_an_evaluation(tmp_path, capsys):
    write(tmp_path, "found.jsonl", "one")
    search = dict(search=f"replay:{tmp_path / 'found.jsonl'}")
    for kind in (Config, EvalConfig):
        out = dict(out=str(tmp_path / kind.__name__))
        begin(config(tmp_path, kind, **search, **out), setup(tmp_path, kind=kind, **search))
    write(tmp_path, "found.jsonl", "one two")
    capsys.readouterr()
    begin(config(tmp_path, **search, out=str(tmp_path / "Config")), setup(tmp_path, **search))
    assert "found.jsonl has changed since" in capsys.readouterr().err
    with pytest.raises(UserError, match="found.jsonl has changed"):
        begin(
            config(tmp_path, EvalConfig, **search, out=str(tmp_path / "EvalConfig")),
            setup(tmp_path, kind=EvalConfig, **search),
        )


def test_a_changed_reward_or_tool_goes_unsaid_or_ends_the_run(tmp_path, capsys, monkeypatch):
    write(tmp_path, "mine.py", "LIMIT = 1\n")
    write(tmp_path, "parts.py", "MOST = 1\n")
    for name, file in ("mine", "mine.py"), ("mine.parts", "parts.py"), ("mines", "mines.py"):
        module = ModuleType(name)
        module.__file__ = str(tmp_path / file)
        monkeypatch.setitem(sys.modules, name, module)
    given = dict(tools="mine:tools")
    begin(config(tmp_path, **given), setup(tmp_path, **given))
    write(tmp_path, "mine.py", '"""A tool."""\n\nLIMIT = 1  # a query\n')
    begin(config(tmp_path, **given), setup(tmp_path, **given))
    assert not capsys.readouterr().err
    write(tmp_path, "mine.py", "LIMIT = 2\n")
    write(tmp_path, "parts.py", "MOST = 2\n")
    mended = runfolder._own_sources() | {"mmsr/reward.py": "mended"}
    monkeypatch.setattr(runfolder, "_own_sources", lambda: mended)
    begin(config(tmp_path, **given), setup(tmp_path, **given))
    said = capsys.readouterr().err
    assert (
        said.count("\n") == 1
        and "mine.py has changed, mine/parts.py has changed, mmsr/reward.py has changed since the run" in said
    )


DECIDING = ("reward", "tools", "model", "chat", "rollout", "grpo", "data/formats", "data/judge", "system/optimizer")


def test_every_module_that_decides_is_among_the_sources():
    sources = runfolder._own_sources()
    assert {f"mmsr/{name}.py" for name in DECIDING} <= set(sources)
    assert all((ROOT / "mmsr" / name).exists() for name in (*runfolder.ASIDE, *runfolder.ASIDE_ROOMS))


@pytest.mark.parametrize(
    "old", [None, '{"/data/q.jsonl": [123, 456]}', '{"given": {', "[]", '{"given": {"a": 1}, "may change": {}}']
)
def test_a_run_of_an_older_version_is_refused_or_goes_on_in_silence(tmp_path, capsys, old):
    begin(config(tmp_path), setup(tmp_path))
    (tmp_path / "out" / "inputs.json").unlink()
    if old is not None:
        write(tmp_path, "out/inputs.json", old)
    begin(config(tmp_path), setup(tmp_path))
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "inputs.json" in said and "could not be checked" in said
    with pytest.raises(UserError, match="--data q.jsonl has changed"):  # from now on
        begin(config(tmp_path), setup(tmp_path), QUESTIONS[:1])


def test_a_file_that_is_no_python_is_hashed_into_a_traceback(tmp_path):
    for wrong in ("def", "\0"):
        write(tmp_path, "no.py", wrong)
        with pytest.raises(UserError, match="no.py: cannot be read as Python"):
            code_digest(tmp_path / "no.py")


def test_a_long_sum_or_a_long_name_ends_in_a_traceback(tmp_path):
    (tmp_path / "sum.py").write_text("total = " + " + ".join(["1"] * 5000))
    assert code_digest(tmp_path / "sum.py") == file_digest(tmp_path / "sum.py")
    with pytest.raises(UserError, match="cannot be written"):
        write_whole(tmp_path / ("x" * 250), [b"a"])


def test_a_folder_that_cannot_be_made_is_told_after_the_model_is_made(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "broken").symlink_to("no/where")
    for out in ("file", "file/a/b", "broken", "broken/a"):
        with pytest.raises(UserError, match=f"--out .*{out}: cannot be made .* is no folder"):
            check_out(tmp_path / out)
    check_out(tmp_path / "a" / "b"), check_out(tmp_path)
    assert not (tmp_path / "a").exists()
