"""The command line and the recipes, held to the contract's table."""

import ast
import dataclasses
import json
import os
import re
import runpy
import sys
from pathlib import Path

import pytest

from mmsr.config import LORA_LR, RECIPES, Config, EvalConfig, Options, check_command_line, in_use, parse
from mmsr.system.errors import UserError
from mmsr.system.options import field_docs, field_groups

ROOT = Path(__file__).parents[1]

# The contract's table, column by column.
SAME = dict(lr=2e-6, kl=0.001, clip_low=0.2, clip_high=0.2, max_images=1, search="replay:fvqa", data="lmms-lab/FVQA")
TABLE = {
    "toy": dict(
        questions=32, mini_batch=32, group_size=8, lr=3e-4, kl=0.001, clip_low=0.2, clip_high=0.2, loss_norm="sequence",
        group_eps=0.05, max_turns=3, max_images=1, max_texts=1, reward="paper", data="toy", search="toy",
    ),
    "blog": dict(
        SAME, questions=512, mini_batch=128, group_size=32, loss_norm="token", group_eps=1e-6, max_turns=2, max_texts=0,
        reward="blog",
    ),
    "paper": dict(
        SAME, questions=512, mini_batch=128, group_size=8, loss_norm="sequence", group_eps=1e-6, max_turns=3,
        max_texts=2, reward="paper",
    ),
    "released": dict(
        SAME, questions=32, mini_batch=32, group_size=4, loss_norm="token", group_eps=1e-6, max_turns=3, max_texts=2,
        reward="paper",
    ),
}  # fmt: skip


def refused(capsys, *argv) -> str:
    """The one line on standard error that this command line gets, with exit status 2."""
    with pytest.raises(SystemExit) as stop:
        parse(argv)
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and err.endswith("\n")
    return err


@pytest.mark.parametrize("recipe", TABLE)
def test_recipe_is_the_contracts(recipe):
    config = dataclasses.asdict(parse(["--recipe", recipe]))
    assert {name: config[name] for name in TABLE[recipe]} == TABLE[recipe]
    assert config["recipe"] == recipe and config["out"] == f"runs/{recipe}" and config["algorithm"] == "grpo"
    assert config["deterministic"] == (recipe == "toy")


def test_recipes_are_these_four_and_know_every_option_they_set():
    assert set(RECIPES) == set(TABLE)
    names = {field.name for field in dataclasses.fields(Config)}
    assert all(set(recipe) <= names for recipe in RECIPES.values())


def test_dataclass_defaults_are_the_toy_recipe():
    toy = parse([])
    differing = {
        field.name for field in dataclasses.fields(Config) if getattr(toy, field.name) != getattr(Config(), field.name)
    }
    assert differing <= {"lr_schedule", "adam_beta2"}


def test_recipe_defaults_to_toy_and_with_a_model_to_blog():
    assert parse([]).recipe == "toy"
    assert parse(["--model", "Qwen2.5-VL-7B"]).recipe == "blog"
    assert parse(["--model", "Qwen2.5-VL-7B", "--recipe", "released"]).group_size == 4


def test_full_toy_world_takes_another_turn_and_leaves_other_recipes_alone():
    def limits(*argv):
        config = parse(argv)
        return config.max_turns, config.max_images, config.max_texts

    assert limits() == limits("--toy", "full") == (3, 1, 1) and limits("--toy", "basic") == (2, 1, 0)
    assert limits("--toy", "full", "--max-texts", "2") == (3, 1, 2), "the command line wins"
    assert limits("--toy", "full", "--recipe", "blog") == limits("--recipe", "blog") == (2, 1, 0)


def test_a_run_from_before_there_was_an_option_cannot_be_resumed(tmp_path):
    config = parse(["--toy-model", "qwen2_5"])
    config.save(tmp_path)
    old = json.loads((tmp_path / "config.json").read_text())
    for name in ("toy_model", "grammar", "thinking", "loss"):
        old.pop(name)
    (tmp_path / "config.json").write_text(json.dumps(old))
    config.check_resumes(tmp_path)
    with pytest.raises(UserError, match=r"--toy-model \(was 'qwen2_5', is 'qwen3'\)"):
        parse(["--toy-model", "qwen3"]).check_resumes(tmp_path)


@pytest.mark.parametrize("prompts, grammar", [("real", "hermes"), ("toy", "hermes"), ("hermes", "tags")])
def test_prompts_speak_another_grammar_than_the_run(prompts, grammar):
    given = ["--model", "m", "--data", "d.jsonl", "--search", "none", "--grammar", grammar, "--prompts", prompts]
    with pytest.raises(UserError, match=f"--prompts {prompts} speaks another grammar than --grammar {grammar}"):
        parse(given)


def test_calls_in_json_are_asked_for_in_words_about_tags(tmp_path, capsys):
    given = ["--model", "m", "--data", "d.jsonl", "--search", "none", "--grammar", "hermes"]
    assert parse(given).prompts == "hermes" and parse([*given, "--prompts", "mine"]).prompts == "mine"
    assert parse(given[:-2]).prompts == "real"
    with pytest.raises(UserError, match="--force-searches replays turns that are written in tags"):
        parse([*given, "--force-searches", "--search", "replay:x.jsonl"])


def test_command_line_wins_over_recipe_and_recipe_over_dataclass():
    config = parse(["--recipe", "blog", "--lr", "1e-5", "--no-deterministic", "--out", "x", "--max-turns=4"])
    assert (config.lr, config.max_turns, config.deterministic, config.out) == (1e-5, 4, False, "x")
    assert config.questions == RECIPES["blog"]["questions"] != Config().questions
    assert config.clip_low == Config().clip_low
    assert parse(["--deterministic", "--recipe", "paper"]).deterministic, "the order of options does not matter"


@pytest.mark.parametrize("kind", [Config, EvalConfig])
def test_help_explains_every_option(capsys, kind):
    with pytest.raises(SystemExit) as stop:
        parse(["--help"], kind)
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    docs, names = field_docs(kind), {field.name for field in dataclasses.fields(kind)}
    assert all(re.search(rf"--{name.replace('_', '-')}[ ,]", text) for name in names)
    assert set(docs) == names, "an option without a word of help"
    squeezed = "".join(text.split())
    for name, words in docs.items():
        assert "".join(words.split()) in squeezed, name
    groups = field_groups(kind)
    assert all(groups[name] and f" {groups[name]}: --" in text for name in names), "an option without a group"
    defaults = re.findall(r"\((?:default|toy(?:/\w+)*): [^()]+\)", text)
    assert len(defaults) == len(names) - 1, "only --recipe has no default, but what it depends on"
    assert "(default: 600)" in text and "(toy/paper/released: paper, blog: blog)" in text
    assert '(default: "")' in text and "(default: off)" in text


@dataclasses.dataclass
class Fork(Config):
    bonus: float = 0.5
    """What a bonus is worth."""

    # ---- reward
    extra: bool = False
    """A fork's own."""


def test_option_of_a_fork_lands_in_no_group(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"], Fork)
    options, *groups = capsys.readouterr().out.split("\n\n")[1:]
    assert "--bonus" in options, "above the first comment there is no group"
    (reward,) = [group for group in groups if group.startswith("reward:")]
    assert "--penalty " in reward and "--extra" in reward


def test_mistake_is_a_traceback_before_torch_is_there(capsys):
    for argv, kind, said in (["--group-size", "1"], Config, "--group-size 1"), (["--model", "x"], EvalConfig, "--data"):
        with pytest.raises(SystemExit) as stop:
            check_command_line(argv, kind, "program.py")
        out, err = capsys.readouterr()
        assert stop.value.code == 2 and not out
        assert err.startswith(f"program.py: {said}") and err.count("\n") == 1


@pytest.mark.parametrize("name, value, said", [
    ("version_info", (3, 10, 14), "needs Python 3.11 or newer"), ("platform", "win32", "on Windows use WSL"),
])  # fmt: skip
def test_old_python_or_windows_is_told_by_a_traceback(capsys, monkeypatch, name, value, said):
    """The package comes before what an old Python cannot read, and before fcntl, which Windows lacks."""
    monkeypatch.setattr(sys, name, value)
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(ROOT / "mmsr" / "__init__.py")
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and not out and said in err and err.count("\n") == 1
    for file in ("mmsr/__init__.py", "train.py", "eval.py", "search.py"):
        ast.parse((ROOT / file).read_text(encoding="utf-8"), feature_version=(3, 8))


def test_config_json_makes_the_same_config_again(tmp_path):
    config = parse(["--recipe", "released", "--seed", "7", "--kl", "0", "--model", "x"])
    config.save(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert Config(**saved) == config


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--unknown", "1"], "--unknown"),
        (["--lear", "1"], "--lear"),
        (["--seeds", "1"], "--seeds"),
        (["--seed"], "--seed"),
        (["--seed", "one"], "one"),
        (["--seed", "1.5"], "1.5"),
        (["--lr", "fast"], "fast"),
        (["--recipe", "tasty"], "tasty"),
        (["--reward", "none"], "none"),
        (["--deterministic", "yes"], "yes"),
        (["stray"], "stray"),
    ],
)
def test_unknown_or_ill_typed_option_is_one_line_and_exit_2(capsys, argv, said):
    assert said in refused(capsys, *argv)


def test_option_cannot_be_abbreviated(capsys):
    assert "--group " in refused(capsys, "--group", "8") + " "


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--group-size", "1"], "--group-size 1"),
        (["--questions", "32", "--mini-batch", "24"], "--mini-batch 24"),
        (["--questions", "0"], "--questions 0"),
        (["--steps", "0"], "--steps 0"),
        (["--steps", "-3"], "--steps -3"),
        (["--temperature", "0"], "--temperature"),
        (["--lr", "-1"], "--lr"),
        (["--kl", "-1"], "--kl"),
        (["--max-texts", "-1"], "--max-texts -1"),
        (["--min-pixels", "100000"], "--min-pixels"),
        (["--force-searches"], "--force-searches"),
        (["--resample", "-1"], "--resample -1"),
        (["--overlong-buffer", "300"], "--overlong-buffer 300 is more than --max-tokens 192"),
        (["--importance-bound", ".5"], "--importance-bound 0.5: give 1 or more"),
        (["--fatal-errors", "3", "--on-tool-error", "drop"], "--fatal-errors and --on-tool-error drop"),
        (["--algorithm", "sft", "--resample", "2"], "--resample is of GRPO"),
        (["--algorithm", "sft", "--loss", "gspo"], "--loss is of GRPO"),
        (["--algorithm", "sft", "--mask-truncated"], "--mask-truncated is of GRPO"),
    ],
)
def test_number_out_of_range_names_its_option(argv, said):
    with pytest.raises(UserError) as error:
        parse(argv)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("option", ["--lr", "--kl", "--temperature", "--group-eps", "--clip-high", "--max-grad-norm"])
def test_not_a_number_is_refused(option):
    """nan passes every comparison with a bound, and trains a model of nan."""
    with pytest.raises((UserError, SystemExit)):
        parse([option, "nan"])


# Evaluation shares the options that are not about training.


def evaluation(*argv) -> EvalConfig:
    return parse(argv, EvalConfig, "eval.py")


def test_recipes_apply_to_evaluation_as_far_as_they_are_not_about_training():
    config = evaluation("--model", "Qwen2.5-VL-7B", "--data", "fvqa.parquet", "fvqa.jsonl", "--recipe", "paper")
    shared = {field.name for field in dataclasses.fields(Options)} - {"data"}
    assert {name: getattr(config, name) for name in shared & set(RECIPES["paper"])} == {
        name: RECIPES["paper"][name] for name in shared & set(RECIPES["paper"])
    }
    assert (config.data, config.temperature, config.out) == (("fvqa.parquet", "fvqa.jsonl"), 0.0, "runs/eval-search")
    assert evaluation("--model", "x", "--data", "y", "--search", "none").recipe == "blog" and evaluation().data == (
        "toy",
    )


def test_evaluation_never_falls_back_on_the_training_questions():
    with pytest.raises(UserError, match="--data is missing"):
        evaluation("--model", "x")


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--data", "x", "x"], "each file once"),
        (["--judge", "http://127.0.0.1"], "--judge-model"),
        (["--judge-model", "gpt"], "--judge "),
        (["--temperature", "-1"], "--temperature"),
        (["--limit", "-1"], "--limit"),
        (["--max-turns", "0"], "--max-turns"),
    ],
)
def test_evaluation_refuses_what_makes_no_sense(argv, said):
    with pytest.raises(UserError) as error:
        evaluation(*argv)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.first_is_quick
@pytest.mark.parametrize("address", ["localhost:8000", "127.0.0.1", "ftp://h", "http://", "http://h:x", "http://a b/",
                                     "http://h/\nx", "file:///etc/x", "//h", "h/v1", "http://h,"])  # fmt: skip
def test_address_that_is_none_is_refused_before_the_work_and_not_after_it(address):
    options = {
        "--judge ": lambda: evaluation("--judge", address, "--judge-model", "m"),
        "--teacher ": lambda: parse(["--algorithm", "sft", "--teacher", address, "--teacher-model", "m"]),
        "--search remote:": lambda: parse(["--search", f"remote:{address}"]),
        " --search remote:": lambda: evaluation("--search", f"remote:{address}"),
    }
    for option, asked in options.items():
        with pytest.raises(UserError) as told:
            asked()
        said = str(told.value)
        assert said.startswith(option.strip()) and "no address of a server; give one such as http" in said
        assert "\n" not in said


def test_address_may_have_a_path_and_a_query():
    for address in (
        "HTTPS://h/v1beta/openai/",
        "http://[::1]:80",
        "http://h/?api-version=1",
        "http://ü.example",
    ):
        assert evaluation("--judge", address, "--judge-model", "m").judge == address


def test_training_options_are_unknown_to_evaluation(capsys):
    with pytest.raises(SystemExit) as stop:
        evaluation("--lr", "1")
    assert stop.value.code == 2 and capsys.readouterr().err.startswith("eval.py: ")


def test_config_json_of_an_evaluation_is_recognised_again(tmp_path):
    evaluation("--mode", "rag").save(tmp_path)
    evaluation("--mode", "rag", "--judge", "http://x", "--judge-model", "y").check_resumes(tmp_path)
    with pytest.raises(UserError, match="--mode") as told:
        evaluation("--mode", "direct").check_resumes(tmp_path)
    assert "learnt" not in str(told.value), "an evaluation leaves no model to go on from"
    (tmp_path / "model").mkdir()
    with pytest.raises(UserError, match=f"--model {tmp_path}/model to start from"):
        evaluation("--mode", "direct").check_resumes(tmp_path)


CANARY = "canary-0123456789"
WITH_A_KEY = [
    f"https://user:{CANARY}@model.example/v1", f"https://{CANARY}@model.example", f"http://user:{CANARY}@[::1]:8000/",
    f"https://user:pa/{CANARY}@model.example", f"https://user:pa@{CANARY}@model.example", f"HTTPS://u:{CANARY}@x:8000",
    f"https://model.example/v1?key={CANARY}", f"https://model.example/?api-version=1&api_key={CANARY}",
    f"https://model.example/v1?X-Amz-Signature={CANARY}", f"https://model.example/#access_token={CANARY}",
    f"https://model.example/?sig={CANARY}&x=1", f"https://model.example/v1?authorization=Bearer%20{CANARY}",
    f"https://model.example/sk-proj-{CANARY}/v1", f"https://model.example/?x=1&ak=1&sk={CANARY}",
]  # fmt: skip
WITHOUT_SCHEME = [f"user:{CANARY}@model.example/v1", f"//user:{CANARY}@model.example"]
ODD = [f"https://user:pa {CANARY}@model.example", f"https://model.example/?api%5Fkey={CANARY}"]


@pytest.mark.first_is_quick
@pytest.mark.parametrize("address", WITHOUT_SCHEME + WITH_A_KEY + ODD)
def test_password_or_key_in_an_address_stands_in_the_files_of_a_run(address):
    given = {
        "--teacher": (Config, ["--algorithm", "sft", "--teacher-model", "x"], "export OPENAI_API_KEY"),
        "--judge": (EvalConfig, ["--judge-model", "x"], "export JUDGE_API_KEY"),
        "--search": (Config, [], "leave it out"),
        "--data": (EvalConfig, ["x.jsonl"], "export HF_TOKEN"),
        "--model": (Config, [], "export HF_TOKEN"),
        "--demonstrations": (Config, ["x.jsonl"], "leave it out"),
    }
    for option, (kind, more, advice) in given.items():
        if "://" not in address and option not in ("--teacher", "--judge", "--search"):
            continue  # a file may be called so
        argv = [option, ("remote:" if option == "--search" else "") + address, *more]
        with pytest.raises(UserError, match=f"^{option}: .*{advice}") as told:
            parse(argv, kind)
        assert CANARY not in str(told.value) and "\n" not in str(told.value)


@pytest.mark.parametrize(
    "argv",
    [
        ["--teacher", "https://m.example/deployments/m@1/chat/completions?api-version=2024-10-21"],
        ["--teacher", "http://[::1]:8000/v1"],
        ["--teacher", "http://m.example:8000/models/m@001?max_tokens=5"],
        ["--search", "local:me@laptop/my.index"],
        ["--search", "replay:runs/a:b@c.sqlite"],
        ["--search", "remote:http://127.0.0.1:8000"],
        ["--data", "me@laptop;key=1.jsonl"],
    ],
)
def test_address_or_file_without_a_key_is_refused(argv):
    parse([*argv, *(["--algorithm", "sft", "--teacher-model", "x"] if argv[0] == "--teacher" else [])])


@pytest.mark.first_is_quick
@pytest.mark.parametrize("address", WITH_A_KEY)
def test_mistyped_option_or_an_older_run_tells_a_key(capsys, tmp_path, address):
    assert CANARY not in refused(capsys, "--teachr", address)
    parse([]).save(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"search": f"remote:{address}"}))
    with pytest.raises(UserError, match="--search") as told:
        parse([]).check_resumes(tmp_path)
    assert CANARY not in str(told.value)


def test_who_trains_a_toy_model_further_is_sent_to_another_recipe(tmp_path):
    parse([]).save(tmp_path)
    (tmp_path / "model").mkdir()
    with pytest.raises(UserError) as told:
        parse(["--steps", "90"]).check_resumes(tmp_path)
    line = re.search(r"--model \S+ --data toy to start", str(told.value))[0].removesuffix(" to start")
    assert parse(line.split()).recipe == "toy"


def test_crash_while_a_run_begins_leaves_its_folder_free(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: 1 / 0)
        patch.setattr(Path, "unlink", lambda *given, **more: None)  # who is killed does not tidy up
        with pytest.raises(ZeroDivisionError):
            parse([]).save(tmp_path)
    assert list(tmp_path.iterdir()) and not in_use(tmp_path)
    parse([]).save(tmp_path)
    assert in_use(tmp_path) and in_use(tmp_path / "config.json") and not in_use(tmp_path / "absent")


def test_one_rollout_a_question_is_enough_for_imitation():
    assert parse(["--algorithm", "sft", "--group-size", "1"]).group_size == 1


# ---- adapters


@pytest.mark.parametrize("argv, said", [
    ("--lora 8 --adapter runs/a/adapter", "leave --lora out"),
    ("--adapter runs/a/adapter --freeze vision", "leave --freeze out"),
    ("--shard none", "weights that are trained are sharded"),
    ("--shard none --freeze vision", "weights that are trained are sharded"),
    ("--lora-alpha 16", "--lora-alpha is an option of adapters"),
    ("--lora-targets q_proj", "--lora-targets is an option of adapters"),
    ("--adapter runs/a/adapter --lora-alpha 16", "--lora-alpha is an option of adapters"),
    ("--merge", "--merge is an option of adapters"),
    ("--lora -1", "--lora -1: give a number from 0 to 4096"),
    ("--lora 4097", "--lora 4097"),
    ("--lora 8 --lora-alpha 0", "--lora-alpha 0"),
])  # fmt: skip
def test_options_of_adapters_that_do_not_go_together(argv, said):
    with pytest.raises(UserError) as told:
        parse(argv.split())
    assert said in str(told.value) and "\n" not in str(told.value)


def test_options_of_adapters_that_go_together_are_refused():
    for argv in (
        "--lora 8 --lora-alpha 16 --lora-targets q_proj vision --merge --shard none",
        "--lora 8 --freeze vision embedding --algorithm sft",
        "--adapter runs/a/adapter --merge --shard none",
        "--freeze vision model.layers.0",
    ):
        parse(argv.split())
    config = parse("--lora 8 --lora-targets q_proj vision --freeze merger head".split())
    assert config.lora_targets == ("q_proj", "vision") and config.freeze == ("merger", "head")
    assert EvalConfig(adapter="runs/a/adapter").adapter == "runs/a/adapter"


@pytest.mark.first_is_quick
@pytest.mark.parametrize("recipe", RECIPES)
def test_learning_rate_of_adapters_is_that_of_weights_or_overrules_the_command_line(recipe):
    usual = RECIPES[recipe]["lr"]
    assert parse(["--recipe", recipe]).lr == parse(["--recipe", recipe, "--lora", "0"]).lr == usual
    for adapters in (["--lora", "4"], ["--adapter", "runs/a/adapter"]):
        assert parse(["--recipe", recipe, *adapters]).lr == pytest.approx(LORA_LR * usual, rel=1e-12)
        assert parse(["--recipe", recipe, *adapters, "--lr", str(usual)]).lr == usual
    assert parse(["--recipe", recipe, "--freeze", "vision"]).lr == usual


def test_a_loss_overrules_the_command_line_or_leaves_the_recipes_norm():
    dr_grpo = parse(["--recipe", "released", "--loss", "dr_grpo"])
    assert (dr_grpo.advantage, dr_grpo.loss_norm, dr_grpo.clip_high) == ("none-std", "constant", 0.2)
    gspo = parse(["--recipe", "released", "--loss", "gspo", "--clip-high", ".28"])
    assert (gspo.loss_norm, gspo.clip_low, gspo.clip_high) == ("sequence", 3e-4, 0.28)
    assert parse(["--loss", "cispo", "--loss-norm", "sequence"]).loss_norm == "sequence"
    for recipe in RECIPES:
        assert parse(["--recipe", recipe]) == parse(["--recipe", recipe, "--loss", "grpo"])


@pytest.mark.parametrize("recipe", ["blog", "paper"])
def test_the_options_of_a_paper_are_refused(recipe):
    """The table of docs/algorithm.md."""
    page = (Path(__file__).parents[1] / "docs/algorithm.md").read_text(encoding="utf-8")
    table = page.partition("## Recipes by paper")[2].partition("\n## ")[0]
    cells = re.findall(r"^\| [^|]+ \| `(--[^`]+)` \|", table, re.M)
    assert len(cells) == 6
    for cell in cells:
        config = parse(["--recipe", recipe, *cell.split()])
        assert config.questions % config.mini_batch == 0 and config.algorithm == "grpo"


def test_help_has_no_group_of_adapters(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    (group,) = [text for text in capsys.readouterr().out.split("\n\n") if text.startswith("LoRA and frozen parts:")]
    assert re.findall(r"^  --([a-z-]+)", group, re.MULTILINE) == [
        "lora",
        "lora-alpha",
        "lora-targets",
        "freeze",
        "merge",
    ]
