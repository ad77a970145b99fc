"""Readers, sampler, recorded conversations: on the real files where they are at hand, and on small ones made here."""

import io
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mmsr import data
from mmsr.data import Sampler, read_examples, recorded_turns
from mmsr.episode import Example, Hit, UserError

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
FVQA = SHARED / "fvqa_sample.parquet"
TRANSCRIPTS = SHARED / "mmsearch_r1_7b_transcripts.jsonl"
real_files = pytest.mark.skipif(
    not (FVQA.exists() and TRANSCRIPTS.exists()), reason=f"{FVQA.name} and {TRANSCRIPTS.name} are not in {SHARED}"
)

FVQA_SCHEMA = pa.schema(
    {
        "prompt": pa.list_(pa.struct({"content": pa.string(), "role": pa.string()})),
        "images": pa.list_(pa.struct({"bytes": pa.binary(), "path": pa.string()})),
        "reward_model": pa.struct(
            {"candidate_answers": pa.string(), "ground_truth": pa.string(), "style": pa.string()}
        ),
        "data_source": pa.string(),
        "image_urls": pa.null(),
        "data_id": pa.string(),
        "category": pa.string(),
    }
)


def picture(seed=0, kind="PNG", side=8):
    dice = random.Random(seed)
    file = io.BytesIO()
    Image.frombytes("RGB", (side, side), dice.randbytes(3 * side * side)).save(file, kind)
    return file.getvalue()


def row(number=0, **changes):
    """A sound row of FVQA's schema."""
    sound = {
        "prompt": [{"content": f"What is this, number {number}?", "role": "user"}],
        "images": [{"bytes": picture(number), "path": None}],
        "reward_model": {"candidate_answers": '["Tejo"]', "ground_truth": "Tagus", "style": "rule"},
        "data_source": "made",
        "image_urls": None,
        "data_id": f"made_{number}",
        "category": "search_free",
    }
    return sound | changes


def truth(aliases, gold="Tagus"):
    return {"candidate_answers": aliases, "ground_truth": gold, "style": "rule"}


def parquet(folder, rows, **options):
    path = folder / "some.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=FVQA_SCHEMA), path, **options)
    return path


def line(number=0, **changes):
    """A sound line of plain JSONL."""
    sound = {"id": f"made_{number}", "image": "pictures/0.png", "question": "What?", "answers": ["Tagus", "Tejo"]}
    return sound | changes


def jsonl(folder, lines):
    (folder / "pictures").mkdir(exist_ok=True)
    (folder / "pictures" / "0.png").write_bytes(picture())
    path = folder / "some.jsonl"
    path.write_text("".join((each if isinstance(each, str) else json.dumps(each)) + "\n" for each in lines))
    return path


# The real files.


@real_files
def test_the_real_rows_read_as_bare_questions_with_their_answers():
    examples = list(read_examples(FVQA))
    assert len(examples) == 26 and {example.category for example in examples} == {"search_free", "search_required"}
    asked = {json.loads(text)["data_id"]: json.loads(text) for text in TRANSCRIPTS.read_text().splitlines()}
    for example in examples:
        recorded = asked[example.id]
        assert example.question == recorded["question"]
        assert example.answers[0] == recorded["ground_truth"]
        assert set(example.answers) == {recorded["ground_truth"], *recorded["candidate_answers"]}
        assert len(set(example.answers)) == len(example.answers)


@real_files
def test_a_page_without_a_summary_gives_its_snippet():
    hits = recorded_turns(TRANSCRIPTS)["fvqa_train_4724"][1].observation.hits
    assert hits[0].title == "The Hershey Company (HSY)" and hits[0].text.startswith("The Hershey Company (HSY) ; Oct 8")
    assert hits[1].text.startswith("The webpage does not contain")
    assert hits[3].url == "https://www.wsj.com/market-data/quotes/HSY" and "August 13, 2026" in hits[3].text


# Sound files.


def test_parquet_rows(tmp_path):
    messages = [
        {"content": "You are a helper.", "role": "system"},
        {"content": "<image>\nWhat river is it? ", "role": "user"},
    ]
    aliases = truth('["Tejo", "Tagus", " ", 7]')
    path = parquet(tmp_path, [row(0), row(1, prompt=messages, reward_model=aliases, category=None), row(2)])
    examples = read_examples(path)
    assert len(examples) == 3
    assert examples[1] == Example("made_1", picture(1), "What river is it?", ("Tagus", "Tejo", "7"), "")
    assert examples[-1] == examples[2] == list(examples)[2]
    with pytest.raises(IndexError):
        examples[3]


def test_null_or_empty_aliases_are_none(tmp_path):
    examples = read_examples(parquet(tmp_path, [row(0, reward_model=truth(None)), row(1, reward_model=truth("[]"))]))
    assert [example.answers for example in examples] == [("Tagus",), ("Tagus",)]


def test_jsonl_rows(tmp_path):
    path = jsonl(tmp_path, [line(0, category="familiar"), "", line(1, id=7, answers=[1953], question=" Où ? ")])
    examples = read_examples(str(path))
    assert list(examples) == [
        Example("made_0", picture(), "What?", ("Tagus", "Tejo"), "familiar"),
        Example("7", picture(), "Où ?", ("1953",), ""),
    ]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
def test_picture_formats(tmp_path, kind):
    path = parquet(tmp_path, [row(0, images=[{"bytes": picture(kind=kind), "path": None}])])
    assert read_examples(path)[0].image == picture(kind=kind)


def test_recurring_ids_are_fine(tmp_path):
    assert [example.id for example in read_examples(parquet(tmp_path, [row(1), row(1)]))] == ["made_1", "made_1"]


def test_an_empty_parquet_file_has_no_examples(tmp_path):
    assert list(read_examples(parquet(tmp_path, []))) == []


# Memory.


def test_pictures_are_read_a_row_group_at_a_time(tmp_path, monkeypatch):
    path = parquet(tmp_path, [row(number) for number in range(40)], row_group_size=4)
    read, original = [], pq.ParquetFile.read_row_groups

    def counted(self, groups, columns):
        read.append((groups, columns))
        return original(self, groups, columns=columns)

    monkeypatch.setattr(pq.ParquetFile, "read_row_groups", counted)
    examples = read_examples(path)
    assert all("images" not in columns for _, columns in read)
    read.clear()
    assert [examples[number].image for number in (9, 8, 11, 30)] == [picture(number) for number in (9, 8, 11, 30)]
    assert read == [([2], ["images"]), ([7], ["images"])]
    list(examples)
    assert examples.pictures.cache_info().currsize == data.GROUPS_KEPT


def test_one_huge_row_group_does_not_land_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "GROUP_BYTES", 1 << 20)
    noise = [random.Random(number).randbytes(100_000) for number in range(400)]  # 40 MB in a single group
    rows = [row(number, images=[{"bytes": picture(number) + noise[number], "path": None}]) for number in range(400)]
    path = parquet(tmp_path, rows)
    del rows
    before, most = pa.total_allocated_bytes(), 0
    examples = read_examples(path)
    for number in random.Random(0).sample(range(400), 60):
        assert examples[number].image == picture(number) + noise[number]
        most = max(most, pa.total_allocated_bytes() - before)
    assert most < 16_000_000


def test_jsonl_keeps_offsets_only(tmp_path):
    examples = read_examples(jsonl(tmp_path, [line(number, question="x" * 1000) for number in range(300)]))
    assert len(examples.offsets) == 300 and examples.offsets.itemsize == 8
    assert examples[250].id == "made_250"


# Errors: one line that names file, row, column and mend.


def refused(act, *words):
    with pytest.raises(UserError) as caught:
        act()
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


BAD_TEXT = [  # change to a sound row, what the message says
    ({"prompt": [{"content": " <image>\n", "role": "user"}]}, "column prompt: the question is empty"),
    ({"prompt": [{"content": "Be brief.", "role": "system"}]}, "column prompt: the question is empty"),
    ({"prompt": None}, "column prompt: the question is empty"),
    ({"prompt": [None, {"content": None, "role": "user"}]}, "column prompt: the question is empty"),
    ({"reward_model": truth("Tejo, Tagus")}, "column reward_model: candidate_answers 'Tejo, Tagus' is not a JSON list"),
    ({"reward_model": truth('"Tejo"')}, "column reward_model: candidate_answers"),
    ({"reward_model": truth("[" * 100_000)}, "column reward_model: candidate_answers"),
    ({"reward_model": truth('[["Tejo"]]')}, "column reward_model"),
    ({"reward_model": truth("[]", gold=" ")}, "column reward_model: there is no answer"),
    ({"reward_model": None}, "column reward_model: there is no answer"),
    ({"data_id": None}, "column data_id: there is no id"),
]


@pytest.mark.parametrize("change, complaint", BAD_TEXT)
def test_bad_text_is_refused_when_the_file_is_opened(tmp_path, change, complaint):
    path = parquet(tmp_path, [row(0), row(1), row(2, **change)])
    refused(lambda: read_examples(path), str(path), "row 2", complaint)


BAD_PICTURES = [
    (None, "no image bytes"),
    ([], "no image bytes"),
    ([None], "no image bytes"),
    ([{"bytes": None, "path": "/etc/hostname"}], "no image bytes"),
    ([{"bytes": b"", "path": None}], "no image bytes"),
    ([{"bytes": b"GIF89a, or so it says", "path": None}], "cannot be decoded; give a JPEG, PNG, WEBP or GIF"),
    ([{"bytes": picture()[:-30], "path": None}], "cannot be decoded"),
    ([{"bytes": picture(kind="BMP"), "path": None}], "cannot be decoded"),
    ([{"bytes": picture(), "path": None}] * 2, "2 pictures"),
]


@pytest.mark.parametrize("images, complaint", BAD_PICTURES)
def test_a_bad_picture_is_refused_when_its_row_is_used(tmp_path, images, complaint):
    path = parquet(tmp_path, [row(0), row(1, images=images)])
    examples = read_examples(path)
    assert examples[0].id == "made_0"
    refused(lambda: examples[1], str(path), "row 1, column images", complaint)


def test_missing_columns_are_named_with_what_was_found(tmp_path):
    path = tmp_path / "other.parquet"
    rows = [{"prompt": "What?", "images": [{"path": "x.png"}], "answer": "Tagus", "category": ""}]
    pq.write_table(pa.Table.from_pylist(rows), path)
    missing = ["prompt[].content", "images[].bytes", "reward_model.ground_truth", "data_id"]
    refused(lambda: read_examples(path), str(path), *missing, "found prompt, images, answer, category")


def test_a_picture_outside_a_list_is_a_wrong_column(tmp_path):
    path = tmp_path / "other.parquet"
    pq.write_table(pa.Table.from_pylist([row(0, images={"bytes": picture(), "path": None})]), path)
    refused(lambda: read_examples(path), str(path), "column images[].bytes missing")


@pytest.mark.parametrize("name", ["absent.parquet", "absent.jsonl"])
def test_a_missing_file(tmp_path, name):
    refused(lambda: read_examples(tmp_path / name), name, "no such file")


def test_a_file_of_another_kind(tmp_path):
    refused(lambda: read_examples(tmp_path / "prompts.pkl"), "prompts.pkl", ".parquet or .jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    refused(lambda: read_examples(tmp_path / "folder.jsonl"), "folder.jsonl", "cannot be read")


def test_a_file_that_is_no_parquet_or_cut_short_at_any_place(tmp_path):
    path = parquet(tmp_path, [row(number) for number in range(6)], row_group_size=2)
    whole = path.read_bytes()
    for kept in [b"", b"version https://git-lfs.github.com/spec/v1", *(whole[: len(whole) * k // 9] for k in range(9))]:
        path.write_bytes(kept)
        refused(lambda: list(read_examples(path)), str(path), "not a Parquet file, or cut short")


def test_a_damaged_parquet_file_is_refused_not_read_as_garbage(tmp_path):
    path = parquet(tmp_path, [row(number) for number in range(6)], compression="none", use_dictionary=False)
    path.write_bytes(path.read_bytes().replace(b"number 3", b"number \xff"))
    refused(lambda: read_examples(path), str(path), "not a Parquet file, or cut short or damaged")


@pytest.mark.parametrize(
    "bad, complaint",
    [
        ("{not json", "row 1: b'{not json\\n' is not a JSON object"),
        ("[1, 2]", "row 1: b'[1, 2]\\n' is not a JSON object"),
        ({"id": "x", "image": "pictures/0.png", "answers": ["a"]}, "row 1, column question: missing (found id, image"),
        (line(question="  "), "row 1, column question: the question is empty"),
        (line(question=None), "row 1, column question: the question is empty"),
        (line(answers="Tagus"), "row 1, column answers: 'Tagus' is not a list of strings"),
        (line(answers=[]), "row 1, column answers: there is no answer"),
        (line(answers=[None]), "row 1, column answers"),
        (line(id=None), "row 1, column id: there is no id"),
    ],
)
def test_a_bad_jsonl_line_is_refused_when_the_file_is_opened(tmp_path, bad, complaint):
    path = jsonl(tmp_path, [line(0), bad])
    refused(lambda: read_examples(path), str(path), complaint)


@pytest.mark.parametrize(
    "image, complaint",
    [
        ("absent.png", "no readable file 'absent.png'"),
        (None, "no readable file None"),
        ("x\0", "no readable file"),
        ("some.jsonl", "cannot be decoded"),
    ],
)
def test_a_bad_jsonl_picture_is_refused_when_its_row_is_used(tmp_path, image, complaint):
    examples = read_examples(jsonl(tmp_path, [line(0), line(1, image=image)]))
    assert examples[0].image == picture()
    refused(lambda: examples[1], "some.jsonl", "row 1, column image", complaint)


# Sampler.


def test_a_resumed_sampler_goes_on_as_if_never_interrupted():
    whole = Sampler(10, seed=3).take(57)
    for cut in (0, 4, 10, 33):
        first = Sampler(10, seed=3)
        drawn = first.take(cut)
        second = Sampler(10, seed=3)
        second.cursor = first.cursor
        assert drawn + second.take(20) + second.take(37 - cut) == whole
        assert second.cursor == 57


def test_every_epoch_draws_every_example_once_in_another_order():
    drawn = Sampler(50, seed=0).take(150)
    epochs = [drawn[start : start + 50] for start in (0, 50, 100)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs} | {tuple(Sampler(50, seed=1).take(50))}) == 4


def test_a_sampler_of_nothing_is_refused():
    refused(lambda: Sampler(0, seed=0), "empty")


def test_a_take_may_be_larger_than_the_data_set():
    assert Sampler(1, seed=0).take(3) == [0, 0, 0]
    assert Sampler(3, seed=0).take(0) == []


# Recorded conversations.


def transcripts(folder, turns):
    path = folder / "transcripts.jsonl"
    path.write_text(json.dumps({"data_id": "made_0", "turns": turns}) + "\n\n")
    return path


SEARCHES = [
    {
        "response": "<search><img></search>",
        "action": "image_search",
        "query": None,
        "tool_result": {"titles": ["A bridge", None], "thumbnail_urls": ["https://example.invalid/1"]},
    },
    {
        "response": "<text_search>Which  River?</text_search>",
        "action": "text_search",
        "query": "Which  River?",
        "tool_result": {
            "documents": [
                {"rank": 2, "title": "River", "url": "https://r", "snippet": "cut"},
                {"rank": 5, "snippet": "S"},
            ],
            "summaries": [{"rank": 5, "summary": ""}, {"rank": 2, "summary": "The Tagus."}],
        },
    },
    {"response": "<answer>Tagus</answer>", "action": "answer", "query": None, "tool_result": None},
]


def test_recorded_turns_join_summaries_by_rank(tmp_path):
    (turns,) = recorded_turns(transcripts(tmp_path, SEARCHES)).values()
    assert turns[0].observation.hits == (Hit("A bridge"), Hit())
    assert turns[1].observation.hits == (Hit("River", "https://r", "The Tagus."), Hit(text="S"))
    assert all(turn.observation.source == "replay" and turn.observation.cached for turn in turns[:2])
    assert (turns[2].response, turns[2].action, turns[2].observation) == ("<answer>Tagus</answer>", "answer", None)


@pytest.mark.parametrize(
    "turns, complaint",
    [
        (3, "TypeError"),
        ([{"action": "answer"}], "KeyError: 'response'"),
        ([SEARCHES[0] | {"tool_result": "none"}], "TypeError"),
    ],
)
def test_an_ill_formed_transcript(tmp_path, turns, complaint):
    path = transcripts(tmp_path, turns)
    refused(lambda: recorded_turns(path), f"{path}: row 0, column turns: not as recorded ({complaint}")


def test_a_transcripts_file_that_is_missing_or_something_else(tmp_path):
    refused(lambda: recorded_turns(tmp_path / "absent.jsonl"), "absent.jsonl", "no such file")
    refused(lambda: recorded_turns(jsonl(tmp_path, [line(0)])), "some.jsonl", "row 0, column data_id: missing")
