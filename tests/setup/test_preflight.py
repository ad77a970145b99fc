"""What is refused before anything is downloaded, opened or made; and in which order the rest is fetched."""

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from chat_helpers import tiny_tokenizer
from fake_hub import at_address, fake_hub
from helpers import each_family, edit_json, picture_bytes, random_adapter, refused, tiny_config, tiny_model

import eval as evaluation
import train
from mmsr import plan
from mmsr.chat import PROMPTS, Chat
from mmsr.config import EvalConfig, parse
from mmsr.episode import Example
from mmsr.lora import adapted
from mmsr.plan import GIB
from mmsr.pretrained.published import SIZES
from mmsr.pretrained.save import save
from mmsr.setup import sizes
from mmsr.setup.checks import prompt_lengths
from mmsr.setup.preflight import preflight
from mmsr.setup.sizes import check_disk, check_memory, check_sizes
from mmsr.system.parallel import SINGLE, Ranks
from mmsr.tools import NoSearch, search_tools
from mmsr.vision import load_image

GPU = Ranks(device=torch.device("cuda"))
HUB_ID = "someone/tuned"
SMALL = ["--recipe", "toy", "--toy", "basic", "--search", "none"]
BIG = "--model Qwen2.5-VL-7B".split()


def options(*given, kind=train.Config):
    return parse(list(map(str, given)), kind)


@pytest.fixture
def card(monkeypatch):
    """A machine of devices of 80 GB, by number."""

    def cards(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(sizes, "_this_machine", lambda ranks, dtype: (80 * GIB, ranks.size, ranks.node_size, 2))

    monkeypatch.setattr("sys.argv", ["train.py", *BIG])
    return cards


# ---- the order


@pytest.fixture
def served(miniature, tmp_path):
    """The miniature model on a hub, and one question whose picture is broken."""
    model = Path(shutil.copytree(miniature, tmp_path / "model"))
    data = tmp_path / "data"
    data.mkdir()
    (data / "0.png").write_bytes(picture_bytes(56, 56)[:100])
    line = {"id": "q", "image": "0.png", "question": "what is this ?", "answers": ["a"]}
    (data / "data.jsonl").write_text(json.dumps(line) + "\n")
    return {f"models/{HUB_ID}": model}, ["--model", HUB_ID, *SMALL, "--data", str(data / "data.jsonl")]


def fetched(asked: list[str]) -> set[str]:
    return {line.rpartition("/")[2] for line in asked if line.startswith("GET") and "/resolve/" in line}


@each_family
def test_a_prompt_is_measured_with_other_patches_than_it_gets(tmp_path):
    processor = tiny_config().vision.processor
    chat = Chat(tiny_tokenizer(tmp_path), PROMPTS / "real", search_tools(NoSearch(), 1, 1))
    example = Example("a", picture_bytes(300, 200), "What is it?", ("a",))
    config = options("--min-pixels", 60 * 60, "--max-pixels", 250 * 250)
    ((_, _, length),) = prompt_lengths([example], chat, processor, config, SINGLE)
    picture = load_image(example.image, config.min_pixels, config.max_pixels, processor=processor)
    assert length == len(chat.prompt(example.question, picture).ids)


def test_weights_are_fetched_for_a_run_that_is_refused(served, tmp_path, monkeypatch):
    folders, argv = served
    config = folders[f"models/{HUB_ID}"] / "config.json"
    with fake_hub(folders, tmp_path / "cache") as asked:
        refused(lambda: train.open_setup(parse(argv)), "row 0, column image")
        with monkeypatch.context() as patch:
            patch.setattr(sizes, "_this_machine", lambda ranks, dtype: (2**20, 1, 1, 4))
            refused(lambda: train.open_setup(parse(argv)), "the run needs")
        whole = config.read_text()
        edit_json(config, model_type="llama")
        shutil.rmtree(tmp_path / "cache")
        refused(
            lambda: evaluation.open_setup(options(*argv, kind=EvalConfig), SINGLE), "'qwen2_5_vl' and 'qwen3_vl' only"
        )
        assert {"config.json", "tokenizer.json"} <= fetched(asked) and "model.safetensors" not in fetched(asked)
        config.write_text(whole)
        shutil.rmtree(tmp_path / "cache")
        (tmp_path / "data" / "0.png").write_bytes(picture_bytes(56, 56))
        setup = train.open_setup(parse(argv))
        assert asked[-1].endswith("model.safetensors") and setup.model.head_weight.isfinite().all()


@pytest.mark.slow
def test_weights_are_fetched_for_an_adapter_of_another_model(served, tmp_path):
    folders, argv = served
    (tmp_path / "data" / "0.png").write_bytes(picture_bytes(56, 56))
    save(tiny_model(), tmp_path / "tiny")
    for name, base in (("fits", folders[f"models/{HUB_ID}"]), ("other", tmp_path / "tiny")):
        folders[f"models/someone/{name}"] = random_adapter(tmp_path / name, base, "q_proj", base_named=HUB_ID)
    with fake_hub(folders, tmp_path / "cache") as asked:
        said = f"it belongs to another model: give its base, {HUB_ID}"
        refused(lambda: train.open_setup(parse([*argv, "--adapter", "someone/other"])), said)
        refused(lambda: train.open_setup(parse([*argv, "--adapter", str(tmp_path / "other")])), said)
        assert "adapter_model.safetensors" in fetched(asked) and "model.safetensors" not in fetched(asked)
        setup = train.open_setup(parse([*argv, "--adapter", "someone/fits"]))
        assert len(adapted(setup.model)) == 2 and "model.safetensors" in fetched(asked)
        at_once = f"--adapter {tmp_path / 'fits'} belongs to {HUB_ID}, not to the toy base model: give --model {HUB_ID}"
        refused(lambda: preflight(options("--adapter", str(tmp_path / "fits")), SINGLE), at_once)


@pytest.mark.parametrize(
    "given, said",
    [
        ("--search live --budget 5", "SERPAPI_API_KEY"),
        ("--search live", "--budget N"),
        ("--search local:/no/where", "python search.py index"),
        ("--search replay:/no/where.jsonl", "no such file"),
        ("--search goggle", "unknown back-end"),
        ("--search toy", "toy world's pictures only"),
        ("--adapter /no/where", "--adapter /no/where: there is no such folder"),
        ("--adapter tests", "--adapter tests has no adapter_config.json"),
        ("--prompts /no/where", "--prompts /no/where"),
        ("--algorithm sft --demonstrations /no/where.jsonl", "/no/where.jsonl: no such file"),
        ("--data ./own.jsonl --search none", "own.jsonl: no such file"),
        ("", "the run needs 2"),
        ("--model Qwen2.5-VL-72B", "the run needs"),
    ],
)
def test_the_hub_is_asked_about_a_run_that_its_names_refuse(given, said, tmp_path, monkeypatch, card):
    card(1)
    for name in ("SERPAPI_API_KEY", "SERPER_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    with fake_hub({}, tmp_path / "cache") as asked:
        refused(lambda: preflight(options(*BIG, *given.split()), GPU), said)
    assert not asked


def test_the_hub_is_asked_for_what_a_run_does_not_read(tmp_path, monkeypatch):
    at_address(monkeypatch, "http://127.0.0.1:1", tmp_path / "cache")
    direct = options(
        "--model", HUB_ID, "--data", "lmms-lab/FVQA:fvqa_test.parquet", "--mode", "direct", kind=EvalConfig
    )
    refused(lambda: preflight(direct, SINGLE), "fvqa_test.parquet of lmms-lab/FVQA:", "hf download someone/tuned &&")
    preflight(options(*SMALL, "--data", "toy", "--model", ""), SINGLE)


@pytest.mark.parametrize("kind", [train.Config, EvalConfig])
def test_own_data_are_looked_up_in_the_searches_recorded_for_fvqa(kind):
    for data in ("own.jsonl", "someone/own", "fvqa_test.parquet"):
        refused(lambda data=data: options(*BIG, "--data", data, kind=kind), "--search is missing", data, "local:FILE")
    assert options(*BIG, "--data", "lmms-lab/FVQA", kind=kind).search == "replay:fvqa"
    assert options(*BIG, "--data", "my/fvqa_train.parquet", kind=kind).search == "replay:fvqa"
    assert options(*BIG, "--data", "own.jsonl", "--search", "none", kind=kind).search == "none"
    assert options("--data", "own.jsonl", kind=kind).search == "toy"
    if kind is EvalConfig:
        assert options(*BIG, "--data", "own.jsonl", "--mode", "direct", kind=kind).search == "none"


# ---- devices


def test_a_run_beside_idle_devices_is_refused_for_its_memory_alone(card):
    model = SIZES["Qwen2.5-VL-7B"]
    line = "type torchrun --nproc-per-node 8 train.py --model Qwen2.5-VL-7B"
    card(8)
    check = lambda *given, ranks=GPU: check_memory(options(*BIG, *given), model, ranks)  # noqa: E731
    refused(
        check, "needs 234.9 GiB on a device of 80.0, and uses 1 of this machine's 8", "on all 8 it needs 44.9", line,
        "by LoRA, python train.py --model Qwen2.5-VL-7B --lora 64 needs 40.4",
    )  # fmt: skip
    refused(lambda: check("--device", "cuda:3"), "--mini-batch 64 saves")
    larger = "needs 84.9 GiB on each, and 35.2 with --lora 64"
    refused(lambda: check("--max-pixels", 4 * 10**6), "--max-pixels 2000000", "would use all 8", larger)
    two_machines = Ranks(size=2, node_size=1, device=torch.device("cuda"))
    refused(lambda: check(ranks=two_machines), "type torchrun --nproc-per-node 8 on each machine")
    check(ranks=Ranks(size=8, node_size=8, device=torch.device("cuda")))
    card(2)
    refused(check, "--nproc-per-node 2", "--mini-batch 64 saves")
    check("--lora", 64)
    card(1)
    with pytest.raises(Exception) as told:
        check()
    assert "torchrun" not in str(told.value)


def test_idle_devices_are_not_told_of_or_end_a_run_that_fits(card, capsys, monkeypatch, tmp_path):
    card(8)
    monkeypatch.setattr(sizes, "_say_memory", lambda *given: None)
    small = ["--model", "Qwen2.5-VL-3B", "--mini-batch", 8, "--out", tmp_path]
    for given, kind, told in (
        (small, train.Config, 1),
        ([*BIG, "--data", "lmms-lab/FVQA"], EvalConfig, 1),
        ([*small, "--device", "cuda:2"], train.Config, 0),
        ([*SMALL, "--data", "toy"], train.Config, 0),
    ):
        model = SIZES["Qwen2.5-VL-3B"] if "--model" in given else tiny_config()
        check_sizes(options(*given, kind=kind), model, GPU)
        said = capsys.readouterr().err
        assert (
            said.count("uses 1 of this machine's 8 devices; to use all: torchrun --nproc-per-node 8 train.py") == told
        )


class Smallest(Ranks):
    """Two processes, the other of which has a device of 20 GiB."""

    def max(self, value: float) -> float:
        return max(value, -20 * GIB)


def test_a_rank_shards_the_weights_that_another_does_not(card, capsys):
    card(1)
    two = Smallest(size=2, node_size=2, device=torch.device("cuda"))
    model, whole = SIZES["Qwen2.5-VL-3B"], options(*BIG, "--lora", 64, "--slots", 16, "--micro-tokens", 8192)
    assert sizes.sharding(whole, model, two) == "none" and not capsys.readouterr().out
    longer = options(*BIG, "--lora", 64, "--micro-tokens", 65536, "--slots", 16)
    assert plan.decided(model, longer, 80 * GIB, 2, 2).shard == "none"
    assert sizes.sharding(longer, model, two) == "node"
    assert "share one copy of the weights (--shard node)" in capsys.readouterr().out
    assert sizes.sharding(options(*BIG), model, two) == "node" and not capsys.readouterr().out


@pytest.mark.parametrize("wrong", ["--freeze towr", "--lora 64 --lora-targets quaver", "--lora 4 --freeze decoder"])
def test_a_part_that_the_model_lacks_is_refused_after_a_download(wrong, tmp_path, card):
    card(8)
    with fake_hub({}, tmp_path / "cache") as asked:
        refused(lambda: preflight(options(*BIG, *wrong.split()), GPU), *wrong.split()[-2:])
    assert not asked


def test_a_run_says_that_it_trains_all_when_it_trains_a_part(card, capsys, tmp_path):
    card(1)
    small = ["--model", "Qwen2.5-VL-3B", "--out", tmp_path]
    model = SIZES["Qwen2.5-VL-3B"]
    for given, said in (
        (["--lora", 64], "Trained: 119,734,272 numbers of adapters, in 252 layers."),
        (["--freeze", "vision", "decoder", "--mini-batch", 16], "of 3,754,622,976 weights."),
        (
            ["--freeze", "embedding", "--mini-batch", 16],
            "the head of this model is its embedding, and is frozen with it",
        ),
        (["--mini-batch", 16], ""),
    ):
        check_sizes(options(*small, *given), model, GPU)
        told = capsys.readouterr().out
        assert said in told and ("Trained" in told) == bool(said)


@pytest.mark.parametrize("ratio, warned", [(8.2, True), (0.4, False)])
def test_a_device_that_converts_every_bfloat16_is_slow_in_silence(ratio, warned, capsys, monkeypatch):
    monkeypatch.setattr(sizes, "time_ratio", lambda dtype, device: ratio)
    sizes.warn_of_slow_products(torch.float32, SINGLE.device)
    assert not capsys.readouterr().err
    sizes.warn_of_slow_products(torch.bfloat16, SINGLE.device)
    told = "a product in bfloat16 takes 8.2 times as long as in float32: give --dtype float32"
    assert (told in capsys.readouterr().err) == warned


# ---- disk

Usage = namedtuple("Usage", "free")


@pytest.fixture
def disk(monkeypatch, tmp_path):
    """A disk with so many free GB, for --out and cache alike."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def free(gb: float) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(gb * 1e9))

    return free


def test_a_run_finds_out_at_its_first_save_that_the_disk_is_too_small(disk, tmp_path, capsys):
    model, out = SIZES["Qwen2.5-VL-7B"], tmp_path / "not" / "there"
    config = options(*BIG, "--out", out)
    eight = Ranks(size=8, node_size=8, device=torch.device("cuda"))
    disk(99)
    refused(lambda: check_disk(config, model, eight), f"--out {out}: ", "3 checkpoints of 100 GB", "99 GB are free")
    refused(lambda: check_disk(config, model, SINGLE, 100 * 10**9), f"{tmp_path / 'hub'}: ", "HF_HOME=FOLDER")
    disk(110)
    refused(lambda: check_disk(config, model, eight, 17 * 10**9), "93 GB are free", "not even one checkpoint")
    check_disk(config, model, eight)
    warned = capsys.readouterr()
    assert "WARNING: --out" in warned.err and "--save-every 0" in warned.err and not warned.out
    disk(900)
    check_disk(config, model, eight)
    said = capsys.readouterr()
    assert said.out.count("\n") == 1 and not said.err
    assert "about 324 GB of disk (3 checkpoints of 100 GB, model 17 GB, rollouts 8.4 GB)" in said.out
    assert not out.exists()


@pytest.mark.parametrize("processes, warned", [(32, False), (64, True)])
def test_processes_without_a_question_of_an_update_are_not_told_of(card, disk, capsys, processes, warned):
    card(8)
    disk(900)
    ranks = Ranks(size=processes, node_size=8, device=torch.device("cuda"))
    check_sizes(options(*BIG, "--recipe", "released"), SIZES["Qwen2.5-VL-7B"], ranks)
    assert ("32 questions for 64 processes" in capsys.readouterr().err) == warned


def test_the_disk_is_told_of_where_it_matters_to_nobody(disk, tmp_path, capsys):
    model = tiny_config()
    disk(20)
    check_disk(options(*SMALL, "--data", "toy", "--out", tmp_path), model, SINGLE)
    check_disk(options(*BIG, "--data", "lmms-lab/FVQA", kind=EvalConfig), SIZES["Qwen2.5-VL-7B"], SINGLE)
    assert capsys.readouterr() == ("", "")
    disk(0)
    refused(lambda: check_disk(options(*SMALL, "--data", "toy", "--out", tmp_path), model, SINGLE), "0.0 GB are free")


def test_a_resumed_run_is_to_find_room_for_what_it_has_saved(disk, tmp_path, capsys):
    model, config = SIZES["Qwen2.5-VL-7B"], options(*BIG, "--out", tmp_path)
    eight = Ranks(size=8, node_size=8, device=torch.device("cuda"))
    saved = tmp_path / "checkpoints" / "step-000010"
    saved.mkdir(parents=True)
    with open(saved / "weights", "wb") as file:
        file.truncate(200 * 10**9)  # a file of holes
    disk(250)
    check_disk(config, model, eight)
    assert not capsys.readouterr().err
    disk(50)
    saved.rename(saved.with_name("step-000100"))
    check_disk(config, model, eight)  # the last: nothing more is saved
