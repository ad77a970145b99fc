"""What `--model NAME` means, and what is said where the hub does not answer."""

import shutil
import socket
import time
from contextlib import closing

import huggingface_hub.constants as constants
import pytest
from fake_hub import at_address, fake_hub
from helpers import refused

from mmsr.data import fvqa
from mmsr.pretrained import hub
from mmsr.pretrained.hub import (
    Wanted,
    refuse_absent,
    resolve,
    resolve_adapter,
    wanted_adapter,
    wanted_model,
    without_weights,
)
from mmsr.system.errors import UserError

MODEL, DATA = "models/someone/tuned", "datasets/someone/asked"


@pytest.fixture
def files(tmp_path):
    """A repository of a model in two parts, and one of data."""
    model, data = tmp_path / "model", tmp_path / "data"
    for folder in (model, data):
        folder.mkdir()
    (model / "config.json").write_text("{}")
    (model / "tokenizer.json").write_text("{}")
    (model / "model.safetensors.index.json").write_text('{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}')
    (model / "1.safetensors").write_bytes(b"x" * 3000)
    (model / "2.safetensors").write_bytes(b"x" * 5000)
    (model / "notes.md").write_bytes(b"x" * 100_000)
    (data / "test.parquet").write_bytes(b"y" * 700)
    return {MODEL: model, DATA: data}


@pytest.fixture
def silent():
    """The address of a server that takes a connection and says nothing."""
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_model_name_means_another_checkpoint(tmp_path, monkeypatch):
    asked = []

    def fetch(repo_id, allow_patterns, **more):
        asked.append(repo_id)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    monkeypatch.setattr(hub, "out_of_reach", lambda: "")
    assert resolve(str(tmp_path)) == resolve("Qwen2.5-VL-7B") == resolve("someone/tuned") == tmp_path
    assert asked == ["Qwen/Qwen2.5-VL-7B-Instruct", "someone/tuned"]
    for name in ("./tuned", "/no/where", "a/b/c", "some one", "qwen2.5-vl-7b"):
        refused(lambda name=name: resolve(name), f"--model {name}: there is no such folder")


def test_a_model_that_cannot_be_fetched_gives_a_traceback(monkeypatch):
    def fail(*_, **__):
        raise ConnectionError("no route\nmore lines")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    monkeypatch.setattr(hub, "out_of_reach", lambda: "")
    refused(lambda: resolve("Qwen2.5-VL-3B"), "'Qwen/Qwen2.5-VL-3B-Instruct'", "no route", "folder")


def test_weights_come_with_the_small_files_or_what_is_there_is_fetched(files, tmp_path):
    model, data = wanted_model("someone/tuned"), fvqa.wanted("someone/asked", "test.parquet")
    with fake_hub(files, tmp_path / "cache") as asked:
        small = sum(file.stat().st_size for file in files[MODEL].glob("*.json"))
        assert refuse_absent([model, data]) == 8000 + small + 700
        folder = without_weights("someone/tuned")
        assert {file.name for file in folder.iterdir()} == {
            "config.json", "tokenizer.json", "model.safetensors.index.json"
        }  # fmt: skip
        assert refuse_absent([model]) == 8000
        assert not any("safetensors" in line and "index" not in line for line in asked)
        assert resolve("someone/tuned") == folder and (folder / "2.safetensors").exists()
        assert fvqa.fetched_file("someone/asked", "test.parquet").read_bytes() == b"y" * 700
        assert refuse_absent([model, data]) == 0
        blobs = tmp_path / "cache" / "models--someone--tuned" / "blobs"
        (folder / "2.safetensors").unlink()
        (blobs / "x.incomplete").write_bytes(b"x" * 4000)
        assert refuse_absent([model]) == 1000, "an interrupted download is asked to find its room twice"


def test_a_name_that_the_hub_does_not_have_is_told_by_its_client(files, tmp_path):
    with fake_hub(files, tmp_path / "cache"):
        absent = Wanted("someone/else", ("a",), "model", "--model FOLDER")
        refused(lambda: refuse_absent([absent]), "no model 'someone/else'", "HF_TOKEN", "--model FOLDER")
        other = fvqa.wanted("someone/asked", "train.parquet")
        refused(lambda: refuse_absent([other]), "someone/asked", "has no train.parquet, but test.parquet")
        refused(lambda: fvqa.fetched_file("someone/asked", "train.parquet"), "it has no such file", "--data FILE")
        refused(lambda: resolve("someone/else"), "it is not there, or only for some")


def test_an_adapter_of_the_hub_is_not_found_or_all_of_its_repository_is_fetched(files, tmp_path, monkeypatch):
    folder, pickled = tmp_path / "adapter", tmp_path / "pickled"
    for made, name in ((folder, "adapter_model.safetensors"), (pickled, "adapter_model.bin")):
        made.mkdir()
        (made / "adapter_config.json").write_text("{}")
        (made / name).write_bytes(b"x" * 900)
        (made / "README.md").write_bytes(b"x" * 100_000)
    assert wanted_adapter(str(folder)) is None and resolve_adapter(str(folder)) == folder
    refused(lambda: wanted_adapter("/no/where"), "--adapter /no/where: there is no such folder", "OWNER/NAME")
    wanted = wanted_adapter("someone/adapter")
    with fake_hub({"models/someone/adapter": folder, "models/someone/old": pickled}, tmp_path / "cache"):
        assert refuse_absent([wanted]) == 902
        found = resolve_adapter("someone/adapter")
        assert {file.name for file in found.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
        assert refuse_absent([wanted]) == 0
        said = "someone/old on the Hugging Face hub has no adapter_model.safetensors, but README.md"
        refused(lambda: refuse_absent([wanted_adapter("someone/old")]), said)
        refused(lambda: refuse_absent([wanted_adapter("someone/else")]), "no model 'someone/else'", "--adapter FOLDER")
    at_address(monkeypatch, "http://127.0.0.1:1", tmp_path / "cache")
    assert refuse_absent([wanted]) == 0 and resolve_adapter("someone/adapter") == found
    refused(lambda: refuse_absent([wanted_adapter("someone/else")]), "hf download someone/else", "--adapter FOLDER")


def test_a_hub_that_does_not_answer_takes_half_a_minute_or_many_lines(files, silent, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(hub, "SECONDS", 0.3)
    wanted = [wanted_model("Qwen2.5-VL-7B"), fvqa.wanted(fvqa.FVQA, fvqa.QUESTIONS, fvqa.RESULTS)]
    told = (
        "hf download Qwen/Qwen2.5-VL-7B-Instruct && hf download --repo-type dataset lmms-lab/FVQA "
        f"{fvqa.QUESTIONS} {fvqa.RESULTS}"
    )
    start = time.monotonic()
    for address, reason in (
        ("http://127.0.0.1:1", "Connection refused"),
        (silent, "does not answer within 0.3 seconds"),
    ):
        at_address(monkeypatch, address, tmp_path / "cache")
        refused(lambda: refuse_absent(wanted), address, reason, told, "HF_HUB_OFFLINE=1", "--model FOLDER", "--data")
        refused(lambda: resolve("Qwen2.5-VL-7B"), reason)
        refused(lambda: fvqa.fetched_file(fvqa.FVQA, fvqa.QUESTIONS), reason)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(lambda: refuse_absent(wanted), "HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE", told)
    with fake_hub(files, tmp_path / "cache", status=503) as asked:
        refused(lambda: refuse_absent(wanted), "answers 503", told)
    assert len(asked) == 1 and not caplog.records
    assert time.monotonic() - start < 3


def test_what_is_in_the_cache_needs_a_network(files, tmp_path, monkeypatch, capsys):
    with fake_hub(files, tmp_path / "cache"):
        folder, data = resolve("someone/tuned"), fvqa.fetched_file("someone/asked", "test.parquet")
    wanted = [wanted_model("someone/tuned"), fvqa.wanted("someone/asked", "test.parquet")]
    at_address(monkeypatch, "http://127.0.0.1:1", tmp_path / "cache")
    for offline in (False, True):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        assert resolve("someone/tuned") == folder and fvqa.fetched_file("someone/asked", "test.parquet") == data
        assert refuse_absent(wanted) == 0
        assert capsys.readouterr().err.count("what its cache holds is used") == 1 - offline


def test_an_interrupted_download_is_taken_for_a_model(files, tmp_path, monkeypatch):
    with fake_hub(files, tmp_path / "cache"):
        folder = resolve("someone/tuned")
    at_address(monkeypatch, "http://127.0.0.1:1", tmp_path / "cache")
    (folder / "2.safetensors").unlink()
    refused(lambda: refuse_absent([wanted_model("someone/tuned")]), "lacks someone/tuned")
    shutil.rmtree(folder)
    with pytest.raises(UserError, match="lacks someone/tuned"):
        refuse_absent([wanted_model("someone/tuned")])
