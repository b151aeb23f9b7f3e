import gzip
import json
import random
import time
from collections import Counter
from functools import partial
from pathlib import Path

import datasets
import pytest

from hawada.data import QAData, corpus, hotpotqa, squad
from hawada.data.corpus import held_out, reachable
from hawada.data.qa import QAExample

SHARED = Path(__file__).parents[2].parent / "shared" / "data" / "qa"
real = pytest.mark.skipif(not SHARED.is_dir(), reason="the real samples are not here")

NAMES = ["Ada", "Wörter", "Łódź", "東京", "Levi's", "São Tomé", "O\u2019Neill"]


def article(seed, paragraphs=30, questions=3, impossible=False):
    """One article as SQuAD has it; every answer but those of impossible questions is in its context."""
    rng = random.Random(seed)
    entry = {"title": f"T{seed}", "paragraphs": []}
    for index in range(paragraphs):
        name = rng.choice(NAMES)
        context = f"{seed}.{index}: {name} came in {1900 + index}.\n It rained."
        qas = [
            {
                "id": f"{seed}.{index}.{number}",
                "question": f" Who came, {number}?",
                "answers": [{"text": text, "answer_start": context.index(text)} for text in (name, f"{name} came")],
            }
            for number in range(questions)
        ]
        if impossible:
            plausible = [{"text": "rain", "answer_start": 0}]
            qas.append({"id": f"{seed}.{index}.no", "question": "Who left?", "answers": [], "is_impossible": True})
            qas[-1]["plausible_answers"] = plausible
        entry["paragraphs"].append({"context": context, "qas": qas})
    return entry


def examples(*articles):
    return [
        QAExample(
            paragraph["context"],
            row["question"].strip(),
            tuple(answer["text"] for answer in row["answers"]),
            row["id"],
        )
        for entry in articles
        for paragraph in entry["paragraphs"]
        for row in paragraph["qas"]
    ]


def hot_row(index, paragraphs=4):
    rng = random.Random(index)
    return {
        "_id": f"h{index}",
        "question": f"Which came first, {index}? ",
        "answer": "yes" if index % 5 == 0 else f"Title {index}.2",
        "type": "bridge",
        "level": "hard",
        "supporting_facts": [[f"Title {index}.2", 0], [f"Title {index}.0", 1]],
        "context": [
            [f"Title {index}.{number}", [f"Thing {rng.random()} is.", " It was.", ' "Quoted" it.']]
            for number in range(paragraphs)
        ],
    }


def hot_context(row):
    return "\n".join(f"{title}: {''.join(sentences)}" for title, sentences in row["context"])


def write(folder, name, content):
    """Write a file of the kind that its suffix names; `content` is rows for .jsonl."""
    text = "\n".join(map(json.dumps, content)) if name.endswith((".jsonl", ".jsonl.gz")) else json.dumps(content)
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return str(path)


def nested(*articles, version="1.1"):
    return {"data": list(articles), "version": version}


@pytest.mark.parametrize("name", ["squad.json", "squad.json.gz", "odd.jsonl.name.json"])
def test_squads_own_format_is_read_and_split_by_context(tmp_path, name):
    data = squad(write(tmp_path, name, nested(article(0), article(1, questions=1))))
    everything = examples(article(0), article(1, questions=1))
    assert isinstance(data, QAData)
    assert data.train == [example for example in everything if not held_out(example.context, 0.1)]
    assert data.test == [example for example in everything if held_out(example.context, 0.1)]
    assert data.train and data.test
    assert not {example.context for example in data.train} & {example.context for example in data.test}


def test_a_larger_share_of_the_contexts_can_be_held_out(tmp_path):
    path = write(tmp_path, "squad.json", nested(article(0, paragraphs=2000, questions=1)))
    few, many = squad(path, test_fraction=0.05), squad(path, test_fraction=0.5)
    assert len(few.test) / 2000 == pytest.approx(0.05, rel=0.3)
    assert len(many.test) / 2000 == pytest.approx(0.5, rel=0.1)
    assert set(few.test) < set(many.test)


@pytest.mark.parametrize(
    ("names", "trained", "tested"),
    [
        (["train-v1.1.json", "dev-v1.1.json"], [0], [1]),
        (["a.json.gz", "squad_v1.1_dev.json.gz"], [0], [1]),
        (["train.json", "validation.json", "test.json"], [0], [2]),
        (["one/train.json", "dev/0.json", "dev/1.json"], [0], [1, 2]),
        (["development.json", "contest.json", "valid.json"], [0, 1], [2]),
    ],
)
def test_a_folder_has_the_test_split_in_files_of_its_own(tmp_path, names, trained, tested):
    for index, name in enumerate(names):
        write(tmp_path, name, nested(article(index)))
    data = squad(str(tmp_path))
    order = sorted(range(len(names)), key=lambda index: tmp_path / names[index])
    assert data.train == examples(*(article(index) for index in order if index in trained))
    assert data.test == examples(*(article(index) for index in order if index in tested))


def test_a_glob_chooses_files(tmp_path):
    for index, name in enumerate(["a0.json", "a1_dev.json.gz", "b0.json"]):
        write(tmp_path, name, nested(article(index)))
    data = squad(str(tmp_path / "a*"))
    assert (data.train, data.test) == (examples(article(0)), examples(article(1)))


def test_a_file_for_testing_alone_is_split(tmp_path):
    data = squad(write(tmp_path, "dev.json", nested(article(0))))
    assert sorted(example.id for example in [*data.train, *data.test]) == sorted(
        example.id for example in examples(article(0))
    )
    assert len(data.train) > len(data.test) > 0


def test_a_context_of_the_test_files_is_not_trained_on(tmp_path):
    write(tmp_path, "train.json", nested(article(0), article(1)))
    write(tmp_path, "dev.json", nested(article(1)))
    data = squad(str(tmp_path))
    assert (data.train, data.test) == (examples(article(0)), examples(article(1)))


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.jsonl.gz"])
@pytest.mark.parametrize(
    "answers",
    [
        {"answers": {"text": ["Ada", "Ada"], "answer_start": [0, 0]}},
        {"answers": [{"text": "Ada", "answer_start": 0}, {"text": "Ada"}]},
        {"answers": ["Ada", "Ada"]},
    ],
    ids=["columns", "objects", "texts"],
)
def test_rows_serve_too(tmp_path, name, answers):
    rows = [{"context": f"Ada, {index}.", "question": "Who?", "id": index, **answers} for index in range(60)]
    data = squad(write(tmp_path, name, rows))
    expected = [QAExample(f"Ada, {index}.", "Who?", ("Ada", "Ada"), str(index)) for index in range(60)]
    assert sorted([*data.train, *data.test], key=lambda example: int(example.id)) == expected


def test_rows_under_data_serve_too(tmp_path):
    rows = [{"context": f"Ada, {index}.", "question": "Who?", "answer": "Ada"} for index in range(60)]
    path = write(tmp_path, "rows.json", rows)
    assert squad(write(tmp_path, "dataset.json", {"data": rows})) == squad(path)


def test_rows_without_an_id_are_named_by_what_they_say(tmp_path):
    rows = [{"context": f"Ada, {index // 2}.", "question": f"Who, {index}?", "answer": "Ada"} for index in range(60)]
    data, again = squad(write(tmp_path, "a.jsonl", rows)), squad(write(tmp_path, "b.jsonl", rows[::-1]))
    names = {(example.context, example.question): example.id for example in [*data.train, *data.test]}
    assert names == {(example.context, example.question): example.id for example in [*again.train, *again.test]}
    assert len(set(names.values())) == 60
    assert {example.answers for example in data.train} == {("Ada",)}


def test_a_byte_order_mark_and_blank_lines_are_no_content(tmp_path):
    lines = [json.dumps({"context": f"Ada, {i}.", "question": "Who?", "answer": "Ada"}) for i in range(60)]
    (tmp_path / "a.jsonl").write_bytes(("\ufeff" + "\n\n".join([*lines, ""])).encode())
    data = squad(str(tmp_path / "a.jsonl"))
    assert len(data.train) + len(data.test) == 60


def test_questions_without_an_answer_are_kept_unless_they_are_left_out(tmp_path):
    content = nested(article(0, impossible=True), version="v2.0")
    path = write(tmp_path, "squad2.json", content)
    data, less = squad(path, "2.0"), squad(path, "2.0", unanswerable=False)
    for whole, part in ((data.train, less.train), (data.test, less.test)):
        without = [example for example in whole if not example.answers]
        assert len(without) == len(whole) / 4 > 0
        assert all(example.question == "Who left?" for example in without)
        assert part == [example for example in whole if example.answers]


@pytest.mark.parametrize(
    "answers", [{"answers": []}, {"answers": {"text": []}}, {"answer": " "}, {"is_impossible": True, "answers": ["x"]}]
)
def test_what_has_no_answer_is_unanswerable(tmp_path, answers):
    rows = [{"context": f"Ada, {index}.", "question": "Who?", **answers} for index in range(60)]
    assert {example.answers for example in squad(write(tmp_path, "a.jsonl", rows)).train} == {()}


def test_samples_are_the_same_random_questions_every_time(tmp_path):
    path = write(tmp_path, "a.json", nested(article(0, 200), article(1, 200)))
    turned = write(tmp_path, "b.json", nested(article(1, 200), article(0, 200)))
    whole, few, more = (squad(path, samples=samples) for samples in (None, 60, 150))
    assert len(few.train) == 60 and len(more.train) == 150
    assert set(few.train) < set(more.train) < set(whole.train)
    assert few == squad(path, samples=60)
    assert few.train == squad(turned, samples=60).train
    assert 15 < sum(example.context[0] == "0" for example in few.train) < 45  # from all over
    assert few.test == more.test == whole.test
    assert set(squad(path, samples=10**6).train) == set(whole.train)


def test_questions_that_are_not_chosen_do_not_stay_in_memory(tmp_path, monkeypatch):
    from hawada.data import qa

    alive, most = 0, 0

    class Counted(QAExample):
        def __init__(self, *fields):
            nonlocal alive, most
            super().__init__(*fields)
            alive += 1
            most = max(most, alive)

        def __del__(self):
            nonlocal alive
            alive -= 1

    monkeypatch.setattr(qa, "QAExample", Counted)
    path = write(tmp_path, "a.jsonl", [hot_row(index) for index in range(500)])
    data = hotpotqa(path, samples=20)
    assert len(data.train) == 20 and most < 20 + len(data.test) + 5


@pytest.mark.parametrize("name", ["hot.jsonl", "hot.jsonl.gz", "hot.json", "hot.json.gz"])
def test_hotpotqas_paragraphs_are_lines_in_their_order(tmp_path, name):
    rows = [hot_row(index) for index in range(60)]
    data = hotpotqa(write(tmp_path, name, rows))
    expected = [
        QAExample(hot_context(row), row["question"].strip(), (row["answer"],), row["_id"])
        for row in rows
        if not held_out(hot_context(row), 0.1)
    ]
    assert data.train == expected and len(data.test) == 60 - len(expected) > 0
    assert data.train[0].context.startswith("Title 0.0: Thing 0.")
    assert ' is. It was. "Quoted" it.\nTitle 0.1: Thing 0.' in data.train[0].context


def columns(row):
    """A row as the hub has it."""
    titles, sentences = zip(*row["context"], strict=True)
    rest = {key: row[key] for key in ("question", "answer", "type", "level")}
    return {"id": row["_id"], **rest, "context": {"title": list(titles), "sentences": list(sentences)}}


@pytest.mark.parametrize(
    "change",
    [columns, lambda row: row | {"context": [{"title": t, "sentences": s} for t, s in row["context"]]}],
    ids=["columns", "objects"],
)
def test_hotpotqa_as_the_hub_has_it_is_the_same(tmp_path, change):
    rows = [hot_row(index) for index in range(60)]
    path = write(tmp_path, "own.jsonl", rows)
    assert hotpotqa(write(tmp_path, "hub.jsonl", map(change, rows))) == hotpotqa(path)


def test_hotpotqa_has_samples_and_test_files_too(tmp_path):
    write(tmp_path, "hotpot_train_v1.1.json", [hot_row(index) for index in range(60)])
    write(tmp_path, "hotpot_dev_distractor_v1.json", [hot_row(index) for index in range(60, 80)])
    data = hotpotqa(str(tmp_path), samples=7)
    assert len(data.train) == 7 and {int(example.id[1:]) for example in data.train} < set(range(60))
    assert [int(example.id[1:]) for example in data.test] == list(range(60, 80))
    assert data == hotpotqa(str(tmp_path), samples=7)


@pytest.mark.parametrize("load", [squad, hotpotqa])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, r"data\.samples: 0 is not a whole number of at least 1; set data\.samples to one"),
        ({"samples": 2.5}, r"data\.samples: 2\.5 is not a whole number"),
        ({"test_fraction": 1.0}, r"data\.test_fraction: 1\.0 is not between 0 and 1; set it to a fraction"),
        ({"test_fraction": 0}, r"data\.test_fraction: 0 is not between 0 and 1"),
    ],
)
def test_numbers_out_of_range_are_named_before_anything_is_read(load, options, message):
    with pytest.raises(ValueError, match=message):
        load("nowhere", **options)


@pytest.mark.parametrize("version", ["3", "v1.1", 2, None])
def test_a_version_that_does_not_exist_is_named(version):
    with pytest.raises(ValueError, match=rf"data\.version: SQuAD has no version {version}; set .* to 1\.1 or 2\.0"):
        squad("nowhere", version)


@pytest.mark.parametrize(
    ("load", "options", "message"),
    [
        (squad, {"test_fraction": 1e-9}, r"data: the test split has no question; .* dev in its name, or another data"),
        (squad, {"test_fraction": 1 - 1e-9}, r"data: the training split has no question; give more questions"),
    ],
)
def test_a_split_without_questions_is_named(tmp_path, load, options, message):
    with pytest.raises(ValueError, match=message):
        load(write(tmp_path, "a.json", nested(article(0))), **options)


def test_training_files_with_the_test_contexts_alone_are_named(tmp_path):
    write(tmp_path, "train.json", nested(article(0)))
    write(tmp_path, "dev.json", nested(article(0)))
    with pytest.raises(ValueError, match=r"data: the training split has no question"):
        squad(str(tmp_path))


@pytest.mark.parametrize("load", [squad, hotpotqa])
@pytest.mark.parametrize("missing", ["nowhere", "nowhere/*.json"])
def test_a_path_that_is_not_there_is_named(tmp_path, load, missing):
    with pytest.raises(ValueError, match=rf"data\.path: .*{missing.replace('*', '.')} does not exist; set data\.path"):
        load(str(tmp_path / missing))


@pytest.mark.parametrize("load", [squad, hotpotqa])
def test_a_folder_without_questions_is_named(tmp_path, load):
    (tmp_path / "notes.txt").write_text("none")
    with pytest.raises(ValueError, match=r"data\.path: .* has no \.json or \.jsonl \(either also \.gz\) file; convert"):
        load(str(tmp_path))


CUT_OFF = gzip.compress(b'{"context": "x", "question": "y", "answer": "z"}\n' * 9000)[:-9]
SQUAD_REMEDY = r"; set data\.path to SQuAD's own \.json, or \.json or \.jsonl rows of context, question and answers$"
HOTPOTQA_REMEDY = r"; set data\.path to HotpotQA's distractor files, \.json or \.jsonl rows of question, answer and"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"{not json", r"a\.json cannot be read \(Expecting property name .*\)"),
        ("a.json", b"", r"a\.json cannot be read \(Expecting value: line 1 column 1 \(char 0\)\)"),
        ("a.json", b"\xff\xfe\xfd", r"a\.json cannot be read \('utf-8' codec .*\)"),
        ("a.json", b"3", r"a\.json cannot be read \('int' object is not iterable\)"),
        ("a.jsonl", b'{"context": "x"\n', r"a\.jsonl cannot be read \(Expecting .*\)"),
        ("a.json.gz", b"plain", r"a\.json\.gz cannot be read \(Not a gzipped file .*\)"),
        ("a.jsonl.gz", CUT_OFF, r"a\.jsonl\.gz cannot be read \(Compressed file ended before .*\)"),
        ("a.json", b'{"data": [{"paragraphs": [{"qas": [{}]}]}]}', r"a\.json has a paragraph without 'context'"),
        ("a.json", b'{"data": [{"paragraphs": [{"context": ""}]}]}', r"a\.json has a paragraph without 'qas'"),
        ("a.json", b'{"data": [{"paragraphs": 1}]}', r"a\.json cannot be read \('int' object is not iterable\)"),
        ("a.json", b'{"rows": []}', r"question 1 of .*a\.json has no text in 'context'"),
        ("a.json", b'["text"]', r"question 1 of .*a\.json has no text in 'context'"),
        ("a.jsonl", b'{"context": "x", "question": "y"}', r"question 1 of .*a\.jsonl has no text in 'answers'"),
        ("a.jsonl", b'{"context": "x"}\n', r"question 1 of .*a\.jsonl has no text in 'question'"),
        ("a.jsonl", b'{"context": "x", "question": "y", "answers": [3]}', r"question 1 of .* has no text in 'answers'"),
    ],
)
@pytest.mark.parametrize("whole_folder", [False, True])
def test_files_that_are_no_squad_are_named(tmp_path, name, content, message, whole_folder):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"^data\.path: .*{message}{SQUAD_REMEDY}") as caught:
        squad(str(tmp_path if whole_folder else tmp_path / name))
    assert "\n" not in str(caught.value)


def test_the_row_that_is_wrong_is_counted(tmp_path):
    rows = [{"context": f"{index}", "question": "Who?", "answer": "Ada"} for index in range(60)]
    rows[41]["question"] = None
    with pytest.raises(ValueError, match=r"data\.path: question 42 of .*a\.jsonl has no text in 'question'; set"):
        squad(write(tmp_path, "a.jsonl", rows))


def test_a_file_without_rows_has_no_question(tmp_path):
    with pytest.raises(ValueError, match=r"data: the training split has no question; give more questions"):
        squad(write(tmp_path, "a.json", nested()))


@pytest.mark.parametrize(
    "context",
    ["running text", None, [], [["Title"]], [["Title", 3]], [[3, ["It was."]]], {"title": ["T"]}, {"text": "x"}, [7]],
)
def test_rows_that_are_no_hotpotqa_are_named(tmp_path, context):
    path = write(tmp_path, "a.jsonl", [hot_row(0), hot_row(1) | {"context": context}])
    with pytest.raises(
        ValueError, match=rf"^data\.path: question 2 of .* has no titles with sentences in 'context'{HOTPOTQA_REMEDY}"
    ):
        hotpotqa(path)


def test_squad_is_no_hotpotqa_nor_the_other_way_round(tmp_path):
    ours, hot = write(tmp_path, "a.json", nested(article(0))), write(tmp_path, "b.jsonl", [hot_row(0)])
    with pytest.raises(ValueError, match=rf"question 1 of .*a\.json has no text in 'answer'{HOTPOTQA_REMEDY}"):
        hotpotqa(ours)
    with pytest.raises(ValueError, match=rf"question 1 of .*b\.jsonl has no text in 'context'{SQUAD_REMEDY}"):
        squad(hot)


HUB = [
    (partial(squad), "rajpurkar/squad", "plain_text"),
    (partial(squad, version="2.0"), "rajpurkar/squad_v2", "squad_v2"),
    (partial(squad, version=2.0), "rajpurkar/squad_v2", "squad_v2"),
    (hotpotqa, "hotpotqa/hotpot_qa", "distractor"),
]


@pytest.mark.parametrize(("load", "name", "configuration"), HUB)
def test_the_hub_gives_training_and_test_questions(no_cache, monkeypatch, load, name, configuration):
    asked = []

    def serve(name, configuration, *, split, streaming):
        asked.append((name, configuration, split, streaming))
        start = 0 if split == "train" else 100
        if configuration == "distractor":
            return datasets.Dataset.from_list([columns(hot_row(index)) for index in range(start, start + 9)])
        rows = [{"context": f"Ada, {i}.", "question": "Who?", "id": f"{i}"} for i in range(start, start + 9)]
        return datasets.Dataset.from_list([row | {"answers": {"text": ["Ada"], "answer_start": [0]}} for row in rows])

    monkeypatch.setattr(corpus, "reachable", lambda url: True)
    monkeypatch.setattr(datasets, "load_dataset", serve)
    data = load(samples=5)
    assert asked == [(name, configuration, part, False) for part in ("train", "validation")]
    assert len(data.train) == 5 and [example.id.strip("h") for example in data.test] == [*map(str, range(100, 109))]
    if configuration == "distractor":
        assert [example.context for example in data.test] == [hot_context(hot_row(i)) for i in range(100, 109)]
    else:
        assert data.test[0] == QAExample("Ada, 100.", "Who?", ("Ada",), "100")


@pytest.mark.parametrize(("load", "name", "configuration"), HUB)
def test_without_network_one_message_comes_soon(no_cache, server, monkeypatch, load, name, configuration):
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", server)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: pytest.fail("the hub was asked"))
    monkeypatch.setattr(corpus, "reachable", partial(reachable, timeout_s=0.5))
    began = time.monotonic()
    with pytest.raises(
        ValueError, match=rf"data\.path: {name} is not in the local cache and .* cannot be reached; .* set data\.path"
    ):
        load()
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(("load", "name", "configuration"), HUB)
def test_what_the_hub_refuses_is_reported(no_cache, monkeypatch, load, name, configuration):
    def refuse(*args, **options):
        raise RuntimeError("no such\ndata set")

    monkeypatch.setattr(corpus, "reachable", lambda url: True)
    monkeypatch.setattr(datasets, "load_dataset", refuse)
    remedy = HOTPOTQA_REMEDY if load is hotpotqa else SQUAD_REMEDY
    with pytest.raises(ValueError, match=rf"data\.path: {name} cannot be read \(no such data set\){remedy}"):
        load()


@real
def test_real_squad():
    data = squad(str(SHARED / "squad*"))
    assert (len(data.train), len(data.test)) == (4330, 10570)
    everyone = [*data.train, *data.test]
    assert all(answer in example.context for example in everyone for answer in example.answers)
    assert all(example.answers and example.question == example.question.strip() != "" for example in everyone)
    assert len({example.id for example in everyone}) == 14900
    assert sum(len(example.answers) for example in data.test) == 34726
    assert not {example.context for example in data.train} & {example.context for example in data.test}
    first = data.test[0]
    assert (first.id, first.answers) == ("56be4db0acb8001400a502ec", ("Denver Broncos",) * 3)
    assert first.question == "Which NFL team represented the AFC at Super Bowl 50?"


@real
def test_the_real_dev_file_alone_is_split_by_context():
    data = squad(str(SHARED / "squad_v1.1_dev.json.gz"))
    assert len(data.train) + len(data.test) == 10570
    train, test = ({example.context for example in part} for part in (data.train, data.test))
    assert len(train) + len(test) == 2067 and not train & test
    assert len(test) / 2067 == pytest.approx(0.1, abs=0.02)


@real
def test_real_hotpotqa():
    data = hotpotqa(str(SHARED / "hotpotqa*"))
    everyone = [*data.train, *data.test]
    assert len(everyone) == len({example.id for example in everyone}) == 300 > len(data.train) > 240
    closed = [example for example in everyone if example.answers[0] in ("yes", "no")]
    assert len(closed) == 20
    assert all(example.answers[0] in example.context for example in everyone if example not in closed)
    assert Counter(example.context.count("\n") + 1 for example in everyone) == {10: 299, 4: 1}
