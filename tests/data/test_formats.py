"""Readers and sampler: on the real file where it is at hand, and on small ones made here in each published layout."""

import base64
import io
import json
import random
import subprocess
import sys
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import FVQA, TRANSCRIPTS, real_files, refused
from PIL import Image

from mmsr.data import tables
from mmsr.data.formats import FORMATS, read_examples
from mmsr.data.sampler import Sampler
from mmsr.episode import Example

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
    text = "".join((each if isinstance(each, str) else json.dumps(each)) + "\n" for each in lines)
    path.write_text(text, "utf-8", "surrogateescape")
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


def test_two_questions_have_one_id(tmp_path):
    """Recorded searches and demonstrations would be those of the other. The same question may come several times."""
    assert [example.id for example in read_examples(parquet(tmp_path, [row(1), row(1)]))] == ["made_1", "made_1"]
    other = [{"question": "Who?"}, {"answers": ["Douro"]}, {"image": "pictures/1.png"}]
    path = jsonl(tmp_path, [line(1), *(line(1, **change) for change in other), line(2), line(2, question="Why?")])
    told = "'made_1' in rows 0 and 1; 'made_1' in rows 0 and 2; 'made_1' in rows 0 and 3 and 1 more; give each its own"
    refused(lambda: read_examples(path), f"some.jsonl: an id stands for several questions: {told}", "--columns id=")
    assert [read_examples(path, columns="id=").text(row)[0] for row in (0, 5)] == ["0", "5"]


def test_good_parquet_is_called_damaged_or_escapes_as_another_error(tmp_path):
    table = pa.Table.from_pylist([{"id": None, "question": "Which river?", "answer": "Tagus", "image": PNG}] * 40)
    table = table.append_column("", pa.array(range(40)))  # R's numbers of rows: nothing that this program reads
    encodings = {"question": "DELTA_LENGTH_BYTE_ARRAY", "answer": "DELTA_BYTE_ARRAY"}
    path = tmp_path / "some.parquet"
    pq.write_table(table, path, data_page_version="2.0", use_dictionary=False, column_encoding=encodings)
    data = read_examples(path)
    assert data[39] == Example("39", PNG, "Which river?", ("Tagus",))
    assert list(data.notes) == ["the column of ids is empty, so its rows' numbers are the ids"]
    for column, value in (("answer", "Tejo"), ("image", PNG)):
        pq.write_table(table.append_column(column, pa.array([value] * 40)), path)
        refused(
            lambda: list(read_examples(path)), f"some.parquet: 2 columns named {column}; rename or drop all but one"
        )
    times = pa.array([1577934245000000001] * 40, pa.timestamp("ns", "UTC"))
    pq.write_table(table.drop(["answer"]).append_column("answer", times), path)
    refused(lambda: read_examples(path), "some.parquet: row 0, column answer: not a value of Python's")


def test_an_empty_parquet_file_has_no_examples(tmp_path):
    assert list(read_examples(parquet(tmp_path, []))) == []


# The benchmarks' published layouts.


def struct(picture_bytes):
    return {"bytes": picture_bytes, "path": None}


def test_every_layout_is_told_by_its_own_columns():
    """One that asks for a subset of another's columns must be looked at after it."""
    for name, layout in FORMATS.items():
        if name == "civqa":
            continue  # gated: its columns are a guess, and --columns tells them
        columns = {layout.id, layout.question, *layout.answers, layout.image}
        fitting = [n for n, f in FORMATS.items() if {f.id, f.question, *f.answers, f.image} <= columns]
        assert fitting[0] == name


def infoseek(folder, **changes):
    (folder / "oven" / "05").mkdir(parents=True)
    (folder / "oven" / "oven_01.JPEG").write_bytes(picture(1, "JPEG"))
    (folder / "oven" / "05" / "oven_05000002.jpg").write_bytes(picture(2, "JPEG"))
    rows = [
        {
            "data_id": "infoseek_val_1", "image_id": "oven_01", "question": "Which river?", "answer": ["Rhine"],
            "answer_eval": ["Rhine", "Rhein"], "data_split": "val_unseen_question",
        },
        {
            "data_id": "infoseek_val_2", "image_id": "oven_05000002", "question": "How long in km?", "answer": ["12"],
            "answer_eval": [{"wikidata": 12.5, "range": [11.0, 14.0]}], "data_split": "val_unseen_entity",
        },
    ]  # fmt: skip
    path = folder / "infoseek_val.jsonl"
    path.write_text("".join(json.dumps(row | changes) + "\n" for row in rows))
    return path


def test_infoseek_finds_its_pictures_by_id_in_the_oven_folder(tmp_path):
    examples = read_examples(infoseek(tmp_path), images=str(tmp_path / "oven"))
    assert examples.format == "infoseek"
    assert list(examples) == [
        Example("infoseek_val_1", picture(1, "JPEG"), "Which river?", ("Rhine", "Rhein"), "val_unseen_question"),
        Example("infoseek_val_2", picture(2, "JPEG"), "How long in km?", ("12", "12.5"), "val_unseen_entity"),
    ]


def test_infoseek_without_its_pictures_says_what_to_give(tmp_path):
    examples = read_examples(infoseek(tmp_path, image_id="oven_9"))
    refused(lambda: examples[1], "row 1, column image_id: no readable file 'oven_9'", "--images")


def mmsearch(folder, images):
    schema = pa.schema(
        {
            "sample_id": pa.string(), "query": pa.string(),
            "query_image": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
            "image_search_result": pa.struct({"bytes": pa.binary(), "path": pa.string()}), "area": pa.string(),
            "subfield": pa.string(), "timestamp": pa.string(), "gt_requery": pa.string(), "gt_answer": pa.string(),
            "alternative_gt_answers": pa.list_(pa.string()),
        }
    )  # fmt: skip
    rows = [
        {
            "sample_id": f"news_{i}", "query": f"Who is it, {i}?", "query_image": image, "area": "news",
            "gt_answer": "Ada", "alternative_gt_answers": ["Ada L.", "Ada"] if i else None,
        }
        for i, image in enumerate(images)
    ]  # fmt: skip
    path = folder / "end2end.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    return path


def test_mmsearch_leaves_out_and_counts_rows_without_a_picture(tmp_path):
    path = mmsearch(tmp_path, [None, struct(picture(1)), struct(None), struct(picture(3)), struct(b"")])
    examples = read_examples(path)
    assert (examples.format, examples.left_out, list(examples.rows)) == ("mmsearch", 3, [1, 3])
    assert list(examples) == [
        Example(f"news_{i}", picture(i), f"Who is it, {i}?", ("Ada", "Ada L."), "news") for i in (1, 3)
    ]


def test_hr_mmsearch_is_taken_for_another_benchmark(tmp_path):
    """Columns as its card lists them."""
    rows = [
        {
            "sample_id": f"sports_{i}", "query": f"Which team is it, {i}?", "query_image": struct(picture(i)),
            "ground_truth": "Ajax", "difficulty": "hard", "category": "sports",
        }
        for i in range(2)
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "hr.parquet")
    examples = read_examples(tmp_path / "hr.parquet")
    assert examples.format == "hr-mmsearch"
    assert examples[1] == Example("sports_1", picture(1), "Which team is it, 1?", ("Ajax",), "sports")


def mmsearch_plus(folder, questions, pictures):
    """Columns as its card lists them, deciphered, and saved by `datasets`."""
    rows = []
    for number, (question, count) in enumerate(zip(questions, pictures)):
        images = {f"img_{i + 1}": struct(picture(10 * number + i)) if i < count else None for i in range(5)}
        rows.append(
            {"question": question, "answer": ["1998", "in 1998"], "num_images": count, "arxiv_id": None,
             "video_url": "v", "category": "geo", "difficulty": "easy", "subtask": "x", **images}
        )  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), folder / "plus.parquet")
    return folder / "plus.parquet"


def test_mmsearch_plus_asks_about_one_of_several_pictures(tmp_path):
    examples = read_examples(mmsearch_plus(tmp_path, ["When?", "Where was it?", "Who?"], [1, 5, 1]))
    assert (examples.format, examples.left_out, list(examples.rows)) == ("mmsearch-plus", 1, [0, 2])
    assert examples[1] == Example("2", picture(20), "Who?", ("1998", "in 1998"), "geo")


def test_mmsearch_plus_as_published_is_asked_enciphered(tmp_path):
    enciphered = base64.b64encode(bytes(range(100, 140))).decode()
    path = mmsearch_plus(tmp_path, [enciphered], [1])
    refused(lambda: read_examples(path), "row 0, column question", "enciphered; decipher it as its card says")


@pytest.mark.parametrize("image", [struct(picture(3)), picture(3), [struct(picture(3))]])
def test_bridgevqa_or_another_mixture_with_fvqa_needs_its_pictures_in_lists(tmp_path, image):
    """DR-MMSearchAgent trains on FVQA's columns whose `images` is one picture: "the format … is no longer a list"."""
    table = pa.Table.from_pylist([row(0) | {"images": image}])
    pq.write_table(table, tmp_path / "bridge.parquet")
    examples = read_examples(tmp_path / "bridge.parquet")
    assert examples.format == "fvqa"
    assert examples[0] == Example("made_0", picture(3), "What is this, number 0?", ("Tagus", "Tejo"), "search_free")


def test_a_picture_cut_short_is_named_by_the_files_row_where_rows_were_left_out(tmp_path):
    examples = read_examples(mmsearch(tmp_path, [None, struct(picture(1)[:-30])]))
    refused(lambda: examples[0], "row 1, column query_image", "cannot be decoded")


SIMPLEVQA = {
    "data_id": 7, "image": base64.b64encode(picture(kind="JPEG")).decode(), "image_description": "", "language": "CN",
    "question": "图中是什么？", "answer": "东京塔", "original_category": "x", "source": "y", "atomic_question": "z",
    "atomic_fact": "w", "vqa_category": "recognition",
}  # fmt: skip


@pytest.mark.parametrize("prefix", ["", "data:image/jpeg;base64,"])
def test_simplevqa_holds_its_pictures_as_base64_text(tmp_path, prefix):
    path = tmp_path / "SimpleVQA.parquet"
    pq.write_table(pa.Table.from_pylist([SIMPLEVQA | {"image": prefix + SIMPLEVQA["image"]}]), path)
    examples = read_examples(path)
    assert examples.format == "simplevqa"
    assert examples[0] == Example("7", picture(kind="JPEG"), "图中是什么？", ("东京塔",), "recognition")


def test_base64_that_is_cut_short_names_its_row(tmp_path):
    rows = [SIMPLEVQA, SIMPLEVQA | {"data_id": 8, "image": SIMPLEVQA["image"][:101]}]
    (tmp_path / "simple.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    refused(lambda: read_examples(tmp_path / "simple.jsonl")[1], "row 1, column image: base64 text of 101 characters")


def test_simplevqas_base64_may_come_in_any_of_the_four_formats():
    from mmsr.data.formats import BASE64_STARTS
    from mmsr.system.images import FORMATS

    for kind in FORMATS:
        assert base64.b64encode(picture(kind=kind)).decode().startswith(BASE64_STARTS)


def livevqa(folder, details):
    (folder / "image").mkdir()
    (folder / "image" / "1.jpg").write_bytes(picture(1, "JPEG"))
    names = ["/image/1.jpg", "image/1.jpg", "1.jpg"]
    rows = [{"sample_id": i, "query": "Who?", "query_image": n, "gt_answer": "Ada"} for i, n in enumerate(names)]
    (folder / "qa.json").write_text(json.dumps(rows))
    if details is not None:
        (folder / "qa_detailed.json").write_text(json.dumps(details))
    return folder / "qa.json"


TOPICS = [{"sample_id": i, "topic": f"topic {i}", "context": "…"} for i in range(3)]


@pytest.mark.parametrize(
    "details, topics",
    [
        (TOPICS, ["topic 0", "topic 1", "topic 2"]),
        ({str(row["sample_id"]): row for row in TOPICS[:2]}, ["topic 0", "topic 1", ""]),
        (None, ["", "", ""]),
    ],
)
def test_livevqa_joins_its_two_files_and_finds_its_pictures(tmp_path, details, topics):
    examples = read_examples(livevqa(tmp_path, details))
    assert examples.format == "livevqa" and [example.category for example in examples] == topics
    assert all(example.image == picture(1, "JPEG") and example.answers == ("Ada",) for example in examples)


def test_columns_of_an_unknown_data_set_are_mapped(tmp_path):
    path = tmp_path / "civqa.parquet"
    row = {"uid": "c1", "ask": "What festival?", "label": "Holi", "img": picture(), "region": "Asia", "id": None}
    row["src"] = "https://example.com/holi.png"
    pq.write_table(pa.Table.from_pylist([row]), path)
    columns = "id=uid, question=ask,answer=label,image=img,category=region,address=src"
    for format in ("civqa", "plain", ""):
        examples = read_examples(path, format, columns)
        assert examples.format == (format or "plain"), "or another benchmark's numbers would stand beside its own"
        assert examples[0] == Example("c1", picture(), "What festival?", ("Holi",), "Asia", row["src"])
    refused(lambda: read_examples(path, "civqa"), "column question, answer, image: missing", "--columns")
    refused(lambda: read_examples(path, "civqa", "query=ask"), "--columns query=ask: give PLACE=COLUMN", "question")
    refused(lambda: read_examples(path, "cifar"), "--format cifar: unknown", "fvqa, infoseek, mmsearch")


def test_a_published_layout_with_one_column_renamed(tmp_path):
    path = tmp_path / "some.parquet"
    rows = pa.Table.from_pylist([row(0)], schema=FVQA_SCHEMA)
    pq.write_table(rows.rename_columns([{"data_id": "uid"}.get(name, name) for name in rows.column_names]), path)
    assert read_examples(path, columns="id=uid")[0].id == read_examples(path, "fvqa", "id=uid")[0].id == "made_0"


def test_a_json_file_that_is_no_array_of_rows(tmp_path):
    path = tmp_path / "qa.json"
    for text, said in [("[1", "not a JSON file"), ('{"a": 1}', "not an array"), ("[1]", "row 0: 1 is not a JSON obj"),
                       ('{"q1": {"image": "a.png"}, "q2": {}, "q3": {}}', "not an array")]:  # fmt: skip
        path.write_text(text)
        refused(lambda: read_examples(path), str(path), said)


def test_pictures_may_be_bytes_or_structs_in_any_layout(tmp_path):
    plain = {"id": "x", "question": "What?", "answers": ["Tagus"]}
    for i, image in enumerate([picture(), struct(picture()), [picture()], [struct(picture())]]):
        path = tmp_path / f"{i}.parquet"
        pq.write_table(pa.Table.from_pylist([plain | {"image": image}]), path)
        assert read_examples(path)[0].image == picture()


# Layouts of others: verl, TRL, OpenAI's messages, ShareGPT, tables that were flattened.


PNG = picture()
DATA_URL = "data:image/png;base64," + base64.b64encode(PNG).decode()
ASKED = [{"role": "user", "content": "<image>Which river?"}]


def told(folder, rows, name="some.parquet"):
    """The data set of these rows: a table, or objects a line."""
    path = folder / name
    if path.suffix in (".parquet", ".pq"):
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_examples(path)


def test_infoseek_as_mmsearch_r1_publishes_it_is_refused(tmp_path):
    """FVQA's columns without `data_id` and `category`, in a file that ends in .pq."""
    rows = [{key: value for key, value in row(n).items() if key not in ("data_id", "category")} for n in range(3)]
    data = told(tmp_path, rows, "mini_data.pq")
    assert data.format == "fvqa" and [example.id for example in data] == ["0", "1", "2"]
    assert data[2] == Example("2", picture(2), "What is this, number 2?", ("Tagus", "Tejo"), "")
    assert list(data.notes) == ["there is no column of ids, so its rows' numbers are the ids"]


VERL = {
    "data_source": "rivers", "prompt": ASKED, "images": [{"bytes": PNG, "path": None}], "ability": "vqa",
    "reward_model": {"style": "rule", "ground_truth": "Tagus"}, "extra_info": {"split": "train", "index": 7},
}  # fmt: skip


@pytest.mark.parametrize(
    "truth, answers",
    [
        ("Tagus", ("Tagus",)),
        (["Tagus", "Tejo", None], ("Tagus", "Tejo")),
        ({"target": ["Tagus", "Tejo"]}, ("Tagus", "Tejo")),
        ('{"target": ["Tagus", "Tejo"]}', ("Tagus", "Tejo")),
        ("['Tagus', 'Tejo']", ("Tagus", "Tejo")),
        ("[1, 2]", ("[1, 2]",)),
        (1953, ("1953",)),
    ],
)
def test_verls_layout_is_refused(tmp_path, truth, answers):
    data = told(tmp_path, [VERL | {"reward_model": {"style": "rule", "ground_truth": truth}}])
    assert (data.format, data[0]) == ("verl", Example("7", PNG, "Which river?", answers, "rivers"))


def test_verls_prompt_is_taken_for_its_question(tmp_path):
    """The prompt goes on with how to answer, as our own prompts do; the bare question stands beside it."""
    prompt = [{"role": "user", "content": "<image>Which river? Put the answer in a box."}]
    known = VERL | {"prompt": prompt, "extra_info": {"index": 7, "question": "<image>Which river?"}}
    beside = VERL | {"prompt": prompt, "extra_info": {"index": 8, "question": None}}
    assert [example.question for example in told(tmp_path, [known, beside])] == [
        "Which river?", "Which river? Put the answer in a box."
    ]  # fmt: skip


PARTS = [{"type": "image"}, {"type": "text", "text": "Which river?"}]
EMBEDDED = [{"type": "text", "text": "Which river?"}, {"type": "image_url", "image_url": {"url": DATA_URL}}]
INPUT = [{"type": "input_text", "text": "Which river?"}, {"type": "input_image", "image_url": DATA_URL}]
SOURCE = [{"type": "image", "source": {"type": "base64", "data": DATA_URL.split(",")[1]}}, PARTS[1]]
TURNS = [{"from": "human", "value": "<image>\nWhich river?"}, {"from": "gpt", "value": "Tagus"}]
SAID = {"role": "assistant", "content": "<reason>A bridge.</reason><answer>Tagus</answer>"}
BARE = {"question": "Which river?", "answer": "Tagus"}
OTHERS = {
    "trl": {"prompt": [{"role": "user", "content": PARTS}], "image": PNG, "solution": "<answer> Tagus </answer>"},
    "trl, problems": {"problem": "<image>Which river?", "images": [PNG], "answer": "Tagus"},
    "trl, in the prompt": {"prompt": [{"role": "user", "content": EMBEDDED}], "answer": "Tagus"},
    "openai": {
        "messages": [
            {"role": "user", "content": EMBEDDED},
            {"role": "assistant", "content": [{"type": "text", "text": "<answer>Tagus</answer>"}]},
        ]
    },
    "openai, beside": {"messages": [*ASKED, SAID], "images": ["0.png"]},
    "openai, Anthropic's": {"messages": [{"role": "user", "content": SOURCE}], "answer": "Tagus"},
    "openai, input": {"messages": [{"role": "user", "content": INPUT}], "answers": ["Tagus"]},
    "sharegpt": {"conversations": TURNS, "image": "0.png"},
    "sharegpt, as text": {"conversations": json.dumps(TURNS), "images": ["0.png"]},
    "sharegpt, searches": {
        "conversations": [
            TURNS[0],
            {"from": "function_call", "value": "{}"},
            {"from": "observation", "value": "A bridge."},
            TURNS[1],
        ],
        "images": [{"path": "0.png"}],
    },
    "fvqa, flattened": {
        "prompt": json.dumps(ASKED), "images": [{"bytes": PNG, "path": None}],
        "reward_model.ground_truth": "Tagus", "reward_model.candidate_answers": "[]",
    },
    "verl, in JSON": VERL | {"prompt": str(ASKED), "reward_model": '{"ground_truth": "Tagus"}', "extra_info": "{}"},
    "verl, as Python prints it": VERL | {"prompt": str(ASKED), "reward_model": "{'ground_truth': ['Tagus']}"},
    "plain": {"question": "Which river?", "answer": "Tagus", "image": DATA_URL},
    "plain, a folder of pictures": BARE | {"file_name": ".\\0.png"},
    "plain, bytes as numbers": BARE | {"image": {"bytes": [*PNG]}},
    "plain, FlashRAG's": {"id": 0, "question": "Which river?", "golden_answers": ["Tagus"], "image": DATA_URL},
    "plain, aliases": BARE | {"answer": {"value": "Tagus", "aliases": ["Tejo"]}, "image": DATA_URL},
    "plain, other marks": BARE | {"question": "<ImageHere> Which river?", "image": "DATA:;" + DATA_URL.split(";")[1]},
    "plain, Phi's mark": BARE | {"question": "<|image_1|>\nWhich river?", "image_path": "0.png"},
    "simplevqa": {"data_id": 0, "question": "Which river?", "answer": "Tagus", "image": {"bytes": DATA_URL}},
}  # fmt: skip


@pytest.mark.parametrize("name", ["some.parquet", "some.jsonl", "some.json"])
@pytest.mark.parametrize("layout", OTHERS)
def test_layouts_of_others_are_refused(tmp_path, layout, name):
    (tmp_path / "0.png").write_bytes(PNG)
    row = OTHERS[layout]
    if not name.endswith("parquet"):  # where bytes are written as base64
        row = json.loads(json.dumps(row, default=lambda picture: base64.b64encode(picture).decode()))
    data = told(tmp_path, [row, row], name)
    assert data.format == layout.partition(",")[0]
    assert [(e.question, e.answers[0], e.image) for e in data] == [("Which river?", "Tagus", PNG)] * 2


def test_rows_of_one_file_name_their_pictures_otherwise(tmp_path):
    plain = {"question": "Which river?", "answer": "Tagus"}
    data = told(tmp_path, [plain | {"image": DATA_URL}, plain | {"images": [DATA_URL]}, plain], "some.jsonl")
    assert data[0].image == data[1].image == PNG
    refused(lambda: data[2], "row 2, column image: no image bytes")


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"prompt": [*ASKED, SAID, *ASKED]}, "column prompt: 2 messages of the user"),
        ({"prompt": [{"role": "user", "content": [{"type": "audio"}]}]}, "column prompt: a part of the type 'audio'"),
        ({"prompt": [{"role": "user", "content": [*PARTS, *PARTS]}]}, "column prompt: 2 places for pictures"),
        ({"prompt": "<image> and <image>: same?"}, "column prompt: 2 places for pictures"),
        ({"prompt": "<image 1> and <image 2>: same?"}, "column prompt: 2 places for pictures"),
        ({"prompt": "<video>What happens?"}, "column prompt: <video> in the question"),
        ({"prompt": {"text": "Which river?"}}, "column prompt: {'text': 'Which river?'} is neither text nor chat"),
        ({"solution": {"a": 1}}, "column solution: {'a': 1} is neither text nor a list of texts"),
        ({"solution": [None, "", float("nan")]}, "column solution: there is no answer"),
        ({"solution": float("inf")}, "column solution: inf is neither text"),
        ({"id": True}, "column id: there is no id, but True"),
    ],
)  # fmt: skip
def test_what_is_not_plainly_one_question_is_read_in_silence(tmp_path, change, complaint):
    row = {"id": 1, "prompt": ASKED, "image": DATA_URL, "solution": "Tagus"}
    refused(lambda: told(tmp_path, [row, row | change], "some.jsonl"), "some.jsonl: row 1", complaint)


def test_a_system_prompt_is_dropped_in_silence(tmp_path):
    data = told(tmp_path, [VERL | {"prompt": [{"role": "system", "content": "Be brief."}, *ASKED]}])
    assert data[0].question == "Which river?"
    assert list(data.notes) == ["column prompt: system messages are left out; --prompts says what the model is told"]


@pytest.mark.parametrize(
    "value, texts",
    [
        (pa.scalar(1.7, pa.float32()), ("1.7",)),
        (pa.scalar(12.0, pa.float64()), ("12",)),
        (pa.scalar(0.00001), ("0.00001",)),
        (pa.scalar(True), ("yes", "true")),
        (pa.scalar(Decimal("1.70"), pa.decimal128(5, 2)), ("1.7",)),
        (pa.scalar(date(1953, 5, 29)), ("1953-05-29",)),
        (pa.scalar(datetime(1953, 5, 29), pa.timestamp("us")), ("1953-05-29",)),
        (pa.scalar(datetime(1953, 5, 29, 11, 30), pa.timestamp("us")), ("1953-05-29 11:30:00",)),
        (pa.scalar(b"Tejo"), ("Tejo",)),
        (pa.scalar({"value": "Tagus", "aliases": ["Tejo"]}), ("Tagus", "Tejo")),
        (pa.scalar(2**60), (str(2**60),)),
    ],
)
def test_an_answer_that_is_no_text_is_written_as_no_one_says_it(tmp_path, value, texts):
    table = pa.Table.from_pylist([{"question": "?!", "image": PNG}])
    pq.write_table(table.append_column("answer", pa.array([value.as_py()], value.type)), tmp_path / "some.parquet")
    assert read_examples(tmp_path / "some.parquet")[0].answers == texts


@pytest.mark.parametrize(
    "text, answers",
    [
        ("['Tejo', \"O'Neill\"]", ("Tejo", "O'Neill")),
        ("['Tejo' 'Rio Tejo']", ("Tejo", "Rio Tejo")),
        ("array(['Tejo', 'Rio Tejo'], dtype=object)", ("Tejo", "Rio Tejo")),
        ("('Tejo',)", ("Tejo",)),
        ("[None, 1953, 1.5, 'a\\'b']", ("1953", "1.5", "a'b")),
        ('[null, "Tejo"]', ("Tejo",)),
        ("[]", ()),
        ("", ()),
    ],
)
def test_candidates_as_python_or_numpy_print_them(tmp_path, text, answers):
    data = told(tmp_path, [row(reward_model=truth(text))])
    assert data[0].answers == ("Tagus", *answers)


@pytest.mark.parametrize("text", ["['Tejo''Rio']", "['Tejo', Rio]", "['Tejo', ['Rio']]", "['Tejo", "[" + "'a' " * 9999])
def test_candidates_that_are_no_list_are_guessed(tmp_path, text):
    refused(lambda: told(tmp_path, [row(reward_model=truth(text))]), "candidate_answers", "is not a JSON list")


def test_names_deeper_than_one_are_not_found(tmp_path):
    rows = [{"q": {"en": "Which river?"}, "a": {"b": {"c": ["Tagus"]}}, "i": {"p": {"bytes": PNG}}}]
    columns = "question=q.en,answers=a.b.c,image=i.p"
    told_by = {".parquet": rows, ".jsonl": json.loads(json.dumps(rows, default=lambda _: DATA_URL))}
    for ending, content in told_by.items():
        path = tmp_path / f"deep{ending}"
        if ending == ".parquet":
            pq.write_table(pa.Table.from_pylist(content), path)
        else:
            path.write_text(json.dumps(content[0]))
        assert read_examples(path, columns=columns)[0] == Example("0", PNG, "Which river?", ("Tagus",))


def test_a_json_files_name_is_believed(tmp_path):
    row = {"question": "Which river?", "answer": "Tagus", "image": DATA_URL}
    texts = ["\n" + json.dumps(row) + "\n\n" + json.dumps(row), "\ufeff" + json.dumps([row, row], indent=1)]
    for name in ("a.json", "a.jsonl", "a.JSON", "a.ndjson"):
        for text in texts:
            (tmp_path / name).write_text(text, encoding="utf-8")
            assert len(read_examples(tmp_path / name)) == 2
    for name in ("data", "annotations"):
        (tmp_path / "a.json").write_text(json.dumps({"version": 1, "license": "none", name: [row, row]}))
        assert len(read_examples(tmp_path / "a.json")) == 2
    (tmp_path / "one.json").write_text(json.dumps(row, indent=1))
    assert len(read_examples(tmp_path / "one.json")) == 1


# Memory.


def shared(value, rows, each=None):
    """A column in which all rows have the same value, or a list of `each` of it: a few bytes in a file."""
    array = pa.DictionaryArray.from_arrays(pa.array([0] * rows * (each or 1), pa.int32()), pa.array([value]))
    return (
        array if each is None else pa.ListArray.from_arrays(pa.array(range(0, len(array) + 1, each), pa.int32()), array)
    )


BOMBS = {
    "a text that all rows have": ({"question": shared("?" * 500_000, 300)}, {}, "column question: unpacks to 0.1 GB"),
    "answers of a row": ({"answers": shared("a" * 500_000, 300, 1)}, {}, "column answers: unpacks to 0.2 GB"),
    "runs": ({"answers": shared("a", 300, 50_000)}, {}, "column answers: unpacks to 0.1 GB"),
    "pages of zeros": (
        {"image": pa.array([PNG + bytes(10_000_000)] * 3 + [PNG] * 297)},
        {"compression": "zstd", "use_dictionary": False},
        "column image: unpacks to 0.0 GB, over 8 times of what it takes in the file",
    ),
    "what a text begins with": (
        {"question": pa.array(["?" * 500_000 + str(row) for row in range(300)])},
        {"use_dictionary": False, "column_encoding": dict.fromkeys(("question", "image"), "DELTA_BYTE_ARRAY")},
        "column question, answers: unpacks to 0.1 GB",
    ),
    "pictures of a row": ({"image": shared(PNG + bytes(100_000), 300, 300)}, {}, "row 0, column image: 28 MiB"),
}


EACH = pa.array(range(301), pa.int32())
ARROW_BOMBS = {  # of types that the file's Arrow schema alone tells; whether they stay shared when they are read
    "lists of a fixed length": (lambda big: pa.FixedSizeListArray.from_arrays(big, 1), True),
    "maps": (lambda big: pa.MapArray.from_arrays(EACH, pa.array(["target"] * 300), big), True),
    "bytes of a fixed length": (lambda big: big.cast(pa.binary()).cast(pa.binary(300_000)), False),
    "texts that are JSON": (lambda big: pa.ExtensionArray.from_storage(pa.json_(), big), False),
    "lists of JSON": (
        lambda big: pa.ListArray.from_arrays(EACH, pa.ExtensionArray.from_storage(pa.json_(), big)), False
    ),
}  # fmt: skip


@pytest.mark.first_is_quick
@pytest.mark.parametrize("bomb", ARROW_BOMBS)
def test_arrows_types_take_gigabytes(tmp_path, monkeypatch, bomb):
    make, stays_shared = ARROW_BOMBS[bomb]
    answer, path = make(pa.array(["a" * 300_000] * 300)), tmp_path / "some.parquet"
    sound = {"question": shared("Which?", 300), "image": shared(PNG, 300)}
    pq.write_table(pa.table(sound | {"answer": answer}), path, row_group_size=150)
    monkeypatch.setattr(tables, "MOST_COLUMN", 50 << 20)
    if not stays_shared:
        monkeypatch.setattr(
            pq.ParquetFile, "read_row_groups", lambda *_, **__: pytest.fail("read before it is bounded")
        )
    refused(lambda: read_examples(path), str(path), "answer: unpacks to 0.1 GB")


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_small_parquet_file_takes_gigabytes(tmp_path, monkeypatch, bomb):
    """With bounds, and bombs, of a tenth of their size."""
    for name, bytes_ in {"MOST_COLUMN": 100 << 20, "MOST_CELL": 20 << 20, "GROUP_BYTES": 12 << 20}.items():
        monkeypatch.setattr(tables, name, bytes_)
    changes, options, complaint = BOMBS[bomb]
    sound = {"question": shared("Which?", 300), "answers": shared("a", 300, 1), "image": shared(PNG, 300)}
    path = tmp_path / "some.parquet"
    pq.write_table(pa.table(sound | changes), path, store_schema=False, **options)
    assert path.stat().st_size < 200_000
    before = pa.default_memory_pool().max_memory()
    refused(lambda: read_examples(path)[0], str(path), complaint)
    assert pa.default_memory_pool().max_memory() - before < 120 << 20


def test_one_picture_for_many_questions_is_kept_once(tmp_path):
    image = PNG + bytes(300_000)
    sound = {"question": shared("Which?", 2000), "answers": shared("a", 2000, 1), "image": shared(image, 2000)}
    pq.write_table(pa.table(sound), tmp_path / "some.parquet", store_schema=False)
    before = pa.total_allocated_bytes()
    data = read_examples(tmp_path / "some.parquet")
    assert data[1999].image == image and pa.total_allocated_bytes() - before < 30_000_000


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
    assert examples.table.pictures.cache_info().currsize == tables.GROUPS_KEPT


def test_one_huge_row_group_does_not_land_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "GROUP_BYTES", 1 << 20)
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


GROWTH = """
import sys, time
from mmsr.data.formats import read_examples
start = time.perf_counter()
examples = read_examples(sys.argv[1])
examples[len(examples) // 2]
seconds = time.perf_counter() - start
for row in range(0, len(examples), 7):
    examples[row]
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))  # getrusage's has the parent's
print(len(examples), int(peak.split()[1]) / 1024, seconds)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_eight_thousand_rows_take_hardly_more_memory_than_two_thousand(tmp_path):
    """Pictures of 30 kB: 240 MB of them, in row groups as pyarrow writes them and in a single one (the slower case)."""
    images = [picture(number, side=100) for number in range(50)]
    for rows_per_group in (500, None):
        peaks = {}
        for size in (2_000, 8_000):
            path = tmp_path / "many.parquet"
            with pq.ParquetWriter(path, FVQA_SCHEMA, compression="none") as writer:
                whole = (size if rows_per_group is None else rows_per_group) // 500
                for start in range(0, size, 500 * whole):
                    numbers = range(start, start + 500 * whole)
                    rows = [row(n, images=[{"bytes": images[n % 50], "path": None}]) for n in numbers]
                    writer.write_table(pa.Table.from_pylist(rows, schema=FVQA_SCHEMA), row_group_size=len(rows))
                    del rows
            done = subprocess.run([sys.executable, "-c", GROWTH, path], capture_output=True, text=True, check=True)
            n, peaks[size], seconds = map(float, done.stdout.split())
            print(
                f"{n:.0f} rows in groups of {rows_per_group}: {peaks[size]:.0f} MiB, first question in {seconds:.1f} s"
            )
        assert peaks[8_000] < peaks[2_000] + 80, f"memory grows with the data set: {peaks} MiB"


def test_jsonl_keeps_offsets_only(tmp_path):
    examples = read_examples(jsonl(tmp_path, [line(number, question="x" * 1000) for number in range(300)]))
    assert len(examples.table.offsets) == 300 and examples.table.offsets.itemsize == 8
    assert examples[250].id == "made_250"


# Errors: one line that names file, row, column and mend.


BAD_TEXT = [  # change to a sound row, what the message says
    ({"prompt": [{"content": " <image>\n", "role": "user"}]}, "column prompt: the question is empty"),
    ({"prompt": [{"content": "Be brief.", "role": "system"}]}, "column prompt: the question is empty"),
    ({"prompt": None}, "column prompt: the question is empty"),
    ({"prompt": [None, {"content": None, "role": "user"}]}, "column prompt: the question is empty"),
    ({"reward_model": truth("Tejo, Tagus")}, "column reward_model.candidate_answers: 'Tejo, Tagus' is not a JSON list"),
    ({"reward_model": truth('"Tejo"')}, "column reward_model.candidate_answers: "),
    ({"reward_model": truth("[" * 100_000)}, "column reward_model.candidate_answers: "),
    ({"reward_model": truth('[["Tejo"]]')}, "column reward_model"),
    ({"reward_model": truth("[]", gold=" ")}, "column reward_model.ground_truth: there is no answer"),
    ({"reward_model": None}, "column reward_model.ground_truth: there is no answer"),
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
    ([{"bytes": None, "path": "absent.png"}], "no readable file 'absent.png'"),
    ([{"bytes": None, "path": "https://example.invalid/1.png"}], "is an address, which is not followed"),
    ([{"bytes": b"", "path": None}], "no image bytes"),
    ([{"bytes": b"GIF89a, or so it says", "path": None}], "cannot be decoded: not a readable JPEG, PNG, WEBP, GIF"),
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


@pytest.mark.parametrize("column", ["prompt", "images", "reward_model", "data_id"])
def test_nulls_name_file_row_and_column(tmp_path, column):
    path = parquet(tmp_path, [row(0), row(1, **{column: None})])
    refused(lambda: list(read_examples(path)), str(path), "row 1", f"column {column}")


@pytest.mark.parametrize("column", ["prompt", "images", "reward_model"])
def test_a_column_that_is_not_there_is_named(tmp_path, column):
    path = tmp_path / "some.parquet"
    pq.write_table(pa.Table.from_pylist([row(0)], schema=FVQA_SCHEMA).drop([column]), path)
    refused(lambda: read_examples(path), str(path), "row 0, column", column, "missing")


WRONG_TYPES = [("prompt", 3), ("images", 3), ("images", [3.5]), ("reward_model", "Tagus"), ("data_id", [])]


@pytest.mark.parametrize("column, value", WRONG_TYPES)
def test_a_column_of_another_type_is_named(tmp_path, column, value):
    path = tmp_path / "some.parquet"
    pq.write_table(pa.Table.from_pylist([row(0) | {column: value}]), path)
    refused(lambda: list(read_examples(path)), str(path), "row 0, column", column)


def test_missing_columns_are_named_with_what_was_found(tmp_path):
    path = tmp_path / "other.parquet"
    rows = [{"prompt": "What?", "images": [{"path": "x.png"}], "label": "Tagus", "category": ""}]
    pq.write_table(pa.Table.from_pylist(rows), path)
    missing = "column reward_model.ground_truth: missing"
    found = "(found prompt, images, label, category; it looks most like verl); try --columns answers=label, or call"
    refused(lambda: read_examples(path), str(path), missing, found)
    assert read_examples(path, columns="answers=label").text(0)[2] == ("Tagus",)
    refused(lambda: read_examples(path, columns="id=uid,answers=label"), "column uid: missing", "--columns")
    refused(lambda: read_examples(path, columns="image=a,image=b"), "--columns image=b: give PLACE=COLUMN, each once")


@pytest.mark.parametrize(
    "changes, columns",
    [
        ({}, "id=qid,question=ask,answers=gold,image=pic"),
        ({"ask": "Name the river.", "lang": "en"}, "id=qid,question=ask,answers=gold,image=pic"),
        ({"pic": {"bytes": PNG, "path": None}, "gold": ["Tagus"]}, "id=qid,question=ask,answers=gold,image=pic"),
        ({"ask": None, "prompt": [{"role": "user", "content": "<image>Name it."}]}, "id=qid,answers=gold,image=pic"),
        ({"qid": None, "ID": 3, "gold": None, "x": "Tagus"}, "id=ID,question=ask,answers=x,image=pic"),
        ({"pic": None, "x": DATA_URL}, "id=qid,question=ask,answers=gold,image=x"),
    ],
)
def test_who_has_columns_of_other_names_is_left_to_find_the_option(tmp_path, changes, columns):
    row = {"qid": "q1", "ask": "Which river?", "gold": "Tagus", "pic": "pictures/0.png"} | changes
    row = {name: value for name, value in row.items() if value is not None}
    path = tmp_path / "own.parquet"
    pq.write_table(pa.Table.from_pylist([row]), path)
    paths = [path] if "bytes" in str(row) else [path, jsonl(tmp_path, [row])]
    for path in paths:
        refused(lambda path=path: read_examples(path), "row 0, column ", f"; try --columns {columns}, or call them id,")
        assert read_examples(path, columns=columns).text(0)[2] == ("Tagus",)


def test_the_category_is_proposed_as_the_answer(tmp_path):
    path = jsonl(tmp_path, [{"id": "q1", "question": "Which river?", "image": "0.png", "category": "search_free"}])
    refused(lambda: read_examples(path), "column answers: missing", "; say which columns hold it, --columns answers=…,")


def test_columns_that_nothing_tells_are_guessed(tmp_path):
    path = jsonl(tmp_path, [{"x": "q1", "y": "Name the river.", "z": "Tagus", "w": "pictures/0.png"}])
    refused(lambda: read_examples(path), "say which columns hold it, --columns image=w,question=…,answers=…, or call")
    refused(lambda: read_examples(path, columns="question=y"), "--columns question=y,image=w,answers=…, or call")


@pytest.mark.parametrize("name", ["absent.parquet", "absent.jsonl"])
def test_a_missing_file(tmp_path, name):
    refused(lambda: read_examples(tmp_path / name), name, "no such file")


@pytest.mark.parametrize("name, separator", [("some.csv", ","), ("some.CSV", ";"), ("some.tsv", "\t")])
def test_csv_of_a_spreadsheet_is_refused(tmp_path, name, separator):
    """With its mark of UTF-8, its ends of lines, a question over two lines, a blank row, a picture in base64."""
    jsonl(tmp_path, [])
    long = "data:image/png;base64," + base64.b64encode(picture(side=300)).decode()
    rows = [
        ["id", "image", "question", "answers"],
        ["1", "pictures/0.png", f'"Which ""great"" river,{separator}\nhere?"', "Tagus"],
        [],
        ["2", f'"{long}"', "Où ?", '"[""Tagus"", ""Tejo""]"'],
    ]
    text = "".join(separator.join(cells) + "\r\n" for cells in rows)
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    first, second = read_examples(tmp_path / name)
    assert first == Example("1", picture(), f'Which "great" river,{separator}\nhere?', ("Tagus",), "")
    assert second == Example("2", picture(side=300), "Où ?", ("Tagus", "Tejo"), "")


@pytest.mark.parametrize("text, complaint", [
    ("id,question\n1,Where, and who?\n", "row 0: 3 cells under 2 columns; write text that holds ',' in quotes"),
    ("id,id\n1,2\n", "several columns named 'id'; rename"), ('id,x\n1,"a\n', "not a CSV file at byte 5 (unexp"),
    ("qid,ask,gold,pic\n1,Who?,Ada,a.png\n", "try --columns id=qid,question=ask,answers=gold,image=pic"),
    ("id,question\n1,O\udcf9?\n", "not UTF-8 text; save it as UTF-8"), ("id,question,answer,image\n1,,a,b\n", "empty"),
])  # fmt: skip
def test_damaged_csv_is_read_as_something_else(tmp_path, text, complaint):
    (tmp_path / "some.csv").write_text(text, "utf-8", "surrogateescape")
    refused(lambda: read_examples(tmp_path / "some.csv"), "some.csv: ", complaint)


def test_a_file_of_another_kind(tmp_path):
    refused(lambda: read_examples(tmp_path / "prompts.pkl"), "prompts.pkl", ".parquet, .jsonl, .json or .csv")
    (tmp_path / "folder.jsonl").mkdir()
    refused(lambda: read_examples(tmp_path / "folder.jsonl"), "folder.jsonl", "cannot be read: a folder; name the")
    refused(lambda: read_examples(tmp_path / "a.jsonl.gz"), "a.jsonl.gz: a packed file; unpack it")
    (tmp_path / "pointer.jsonl").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
    refused(lambda: read_examples(tmp_path / "pointer.jsonl"), "Git LFS's pointer to one; fetch it with: git lfs pull")


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
        ("[1, 2]", "row 1: b'[1, 2]\\n' is not a JSON object; write one a line"),
        (json.dumps(line(1)) + ",", "is not a JSON object; take away the comma behind it"),
        (
            json.dumps(line(1), indent=1),
            "row 1: b'{\\n' is not a JSON object; write each on one line, or all",
        ),
        (str(line(1)), "is not a JSON object; write double quotes"),
        ('{"question": "O\udcf9?"}', "is not a JSON object; save the file as UTF-8"),
        ({"id": "x", "image": "pictures/0.png", "answers": ["a"]}, "row 1, column question: missing (found id, image"),
        (line(question="  "), "row 1, column question: the question is empty"),
        (line(question=None), "row 1, column question: the question is empty"),
        (line(answers="Tagus"), "row 1, column answers: 'Tagus' is not a JSON list"),
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
        (None, "no image bytes"),
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
