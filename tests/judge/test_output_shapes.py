"""Files of outputs in the shapes that people have: each is read to the same numbers, or refused in one message."""

import gzip
import io
import json
import sys
import unicodedata

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.servers import ScriptedJudge

from eval.board.leaderboard import read_leaderboard
from eval.board.run_files import read_run
from eval.judge.config import JudgeConfig
from eval.outputs.matching import match_outputs, with_instructions_of
from eval.outputs.reading import read_outputs
from jobs.cli import main
from jobs.judging import judge_files
from otpo.errors import UserError, WorkError
from pipeline.progress import silent

ASKED = [
    'Say "hi", twice;\nthen stop.', "¿Qué hora es?", "Translate.\n\nBonjour", "Name a river", "2 + 2?",
    "Tab\there", "Zusammenfassen: schöne Grüße",
]  # fmt: skip
ROWS = [
    {
        "dataset": "d",
        "instruction": text,
        "output": f"Answer {n}, with a comma\nand {'more ' * n}words — ü",
        "generator": "m",
    }
    for n, text in enumerate(ASKED)
]
REFERENCE = [{**row, "output": f"Reference {n}" * 3, "generator": "base"} for n, row in enumerate(ROWS)]
FRAME = pd.DataFrame(ROWS)


def js(value, code="utf-8", **how):
    return json.dumps(value, ensure_ascii=False, **how).encode(code)


def lines(rows):
    return b"\n".join(map(js, rows))


def csv(rows, code="utf-8", **how):
    return pd.DataFrame(rows).to_csv(index=False, **how).encode(code)


def parquet(rows):
    file = io.BytesIO()
    pd.DataFrame(rows).to_parquet(file)
    return file.getvalue()


def named(**names):
    """The rows with other names of columns."""
    return [{names.get(column, column): cell for column, cell in row.items()} for row in ROWS]


def with_output(wrap):
    return [{**row, "output": wrap(row)} for row in ROWS]


def said(role, content):
    return {"role": role, "content": content}


def turns(row):
    return [said("user", row["instruction"]), said("assistant", row["output"])]


def without(*columns, **more):
    return [
        {column: cell for column, cell in row.items() if column not in columns}
        | {column: make(row) for column, make in more.items()}
        for row in ROWS
    ]


def asked_in(row):
    return row["instruction"]


def said_in(row):
    return row["output"]


def asked_as(change):
    return [{**row, "instruction": change(row["instruction"])} for row in ROWS]


ANNOTATIONS = [
    {
        "instruction": ours["instruction"], "output_1": theirs["output"], "generator_1": "base", "dataset": "d",
        "output_2": ours["output"], "generator_2": "m", "annotator": "j", "preference": 1.5, "raw_completion": {},
    }
    for ours, theirs in zip(ROWS, REFERENCE, strict=True)
]  # fmt: skip
SHAREGPT = [[{"from": "human", "value": row["instruction"]}, {"from": "gpt", "value": row["output"]}] for row in ROWS]

READ = {
    "list": (".json", js(ROWS)),
    "indented": (".json", js(ROWS, indent=2)),
    "ascii": (".json", json.dumps(ROWS).encode()),
    "lines": (".jsonl", lines(ROWS)),
    "lines named json": (".json", lines(ROWS)),
    "list named jsonl": (".jsonl", js(ROWS, indent=1)),
    "byte order mark": (".json", js(ROWS, "utf-8-sig")),
    "utf-16": (".json", js(ROWS, "utf-16")),
    "utf-16 without a mark": (".json", js(ROWS, "utf-16-le")),
    "utf-32": (".jsonl", lines(ROWS).decode().encode("utf-32")),
    "gzip": (".json.gz", gzip.compress(js(ROWS))),
    "gzip named json": (".json", gzip.compress(js(ROWS))),
    "json named gz": (".json.gz", js(ROWS)),
    "data": (".json", js({"data": ROWS})),
    "outputs beside a name": (".json", js({"model": "x", "date": "today", "outputs": ROWS})),
    "lists of cells": (".json", js(FRAME.to_dict("list"))),
    "pandas columns": (".json", FRAME.to_json().encode()),
    "pandas index": (".json", FRAME.to_json(orient="index").encode()),
    "pandas split": (".json", FRAME.to_json(orient="split").encode()),
    "pandas table": (".json", FRAME.to_json(orient="table").encode()),
    "csv": (".csv", csv(ROWS)),
    "csv of a spreadsheet": (".csv", csv(ROWS, "utf-8-sig", sep=";", lineterminator="\r\n")),
    "csv, utf-16 and tabs": (".csv", csv(ROWS, "utf-16", sep="\t")),
    "tsv": (".tsv", csv(ROWS, sep="\t")),
    "csv with an index": (".csv", FRAME.to_csv().encode()),
    "parquet": (".parquet", parquet(ROWS)),
    "parquet of bytes": (".parquet", parquet(with_output(lambda row: row["output"].encode()))),
    "response": (".json", js(named(output="response"))),
    "prompt and completion": (".jsonl", lines(named(instruction="prompt", output="completion"))),
    "question and prediction": (".csv", csv(named(instruction="question", output="prediction"))),
    "query and generated_text": (".json", js(named(instruction="query", output="generated_text"))),
    "input and output": (".json", js(named(instruction="input"))),
    "capitals": (".csv", csv(named(instruction="Instruction", output=" Output", generator="Model"))),
    "model in place of generator": (".json", js(named(generator="model_name"))),
    "two columns that say the same": (".json", js(without("output", response=said_in, answer=said_in))),
    "another column beside output": (".json", js(without(answer=lambda row: "gold", prompt=lambda row: "templated"))),
    "annotations": (".json", js(ANNOTATIONS)),
    "messages as output": (".json", js(with_output(turns))),
    "an answer as one message": (".json", js(with_output(lambda row: said("assistant", row["output"])))),
    "a system message before": (".json", js(with_output(lambda row: [said("system", "Be brief."), *turns(row)]))),
    "messages as text": (".csv", csv(with_output(lambda row: json.dumps(turns(row))))),
    "messages as python prints them": (".csv", csv(with_output(lambda row: str(turns(row))))),
    "parts of a message": (".json", js(with_output(lambda row: said("assistant", [{"text": said_in(row)}])))),
    "a list of one text": (".json", js(with_output(lambda row: [row["output"]]))),
    "messages alone": (".jsonl", lines(without("instruction", "output", messages=turns))),
    "sharegpt": (".json", js([{"conversations": each, "model": "m"} for each in SHAREGPT])),
    "messages beside the instruction": (".parquet", parquet(without("output", messages=turns))),
    "a prompt of messages": (".json", js(without("instruction", prompt=lambda row: turns(row)[:1]))),
    "a prompt of messages as text": (".csv", csv(without("instruction", prompt=lambda row: json.dumps(turns(row)[0])))),
    "no generator": (".json", js(without("generator"))),
    "alpaca's input": (".json", js([
        {**row, "instruction": first, "input": second}
        for row in ROWS for first, _, second in [row["instruction"].partition("\n\n")]
    ])),
    "white space at the ends": (".json", js(asked_as(lambda text: f"{text} \n"))),
    "line ends of windows": (".json", js(asked_as(lambda text: text.replace("\n", "\r\n")))),
    "another unicode form": (".json", js(asked_as(lambda text: unicodedata.normalize("NFD", text)))),
    "another order": (".json", js(ROWS[::-1])),
    "counts as text": (".csv", csv(without(n_tokens=lambda row: "12", truncated=lambda row: "False"))),
    "columns of all kinds beside": (".parquet", parquet(without(
        time=lambda row: pd.Timestamp("2025-01-01"), raw=lambda row: b"\xff", scores=lambda row: [1.0, None],
    ))),
    "half a letter beside": (".json", json.dumps(without(**{"note \ude00": lambda row: "\ud83d"})).encode()),
}  # fmt: skip

MAPPED = {
    "other names": (".csv", csv(named(instruction="frage", output="antwort", generator="modell"))),
    "the gold answer beside": (".json", js(without("output", answer=lambda row: "gold", antwort=said_in))),
    "a text beside that may be the prompt": (
        ".json", js(without("instruction", prompt=lambda row: "rendered", frage=asked_in))
    ),
}  # fmt: skip

REFUSED = {
    "latin-1": (".json", js(ROWS).decode().replace("—", "-").encode("latin-1"), "iconv -f WINDOWS-1252 -t UTF-8"),
    "latin-1 csv": (".csv", csv(ROWS).decode().replace("—", "-").encode("latin-1"), "iconv -f WINDOWS-1252"),
    "parquet named json": (".json", parquet(ROWS), "is a parquet file: name it .parquet"),
    "zip": (".json", b"PK\x03\x04\xff\xfe", "is a zip archive: unpack it"),
    "a spreadsheet": (".xlsx", b"PK", "expected .json, .jsonl, .csv, .tsv, .parquet"),
    "empty": (".json", b"", "is empty"),
    "no rows": (".json", b"[]", "holds no rows"),
    "half a file": (".json", js(ROWS)[:300], "is not JSON"),
    "half a gzip": (".json", gzip.compress(js(ROWS))[:-9], "cannot read"),
    "half a line": (".jsonl", lines(ROWS)[:-5], "is not JSON lines: line 7"),
    "prose": (".json", b"Answers: see below", "is not JSON"),
    "lists of models": (".json", js({"a": ROWS, "b": ROWS}), "several lists (a, b)"),
    "a map": (".json", js({row["instruction"]: row["output"] for row in ROWS}), "expected a list of rows"),
    "a row that is a list": (".json", js([list(row.values()) for row in ROWS]), "row 0 is ["),
    "texts": (".json", js([row["output"] for row in ROWS]), "every row to be an object"),
    "columns of different lengths": (".json", js({"instruction": ASKED, "output": ["a"]}), "instruction 7, output 1"),
    "a key twice": (".jsonl", b'{"instruction": "a", "output": "b", "output": "c"}', "the key 'output' twice"),
    "a column twice": (".csv", b"instruction,output,output\na,b,c\n", "the column 'output' twice"),
    "too many cells": (".csv", b"instruction,output\na,b, and c\n", "line 2 has 3 cells"),
    "nested without end": (".json", b"[" * 50_000, "cannot read"),
    "a number without end": (".json", b'[{"instruction": ' + b"1" * 5000 + b"}]", "cannot read"),
    "no output": (".json", js(named(output="notes")), "no column is the output; there are dataset, instruction, notes"),
    "an unknown name": (".json", js(named(output="my_reply")), "--column output=my_reply"),
    "a name with a space": (".csv", csv(named(output="my reply")), "--column 'output=my reply'"),
    "no instruction": (".json", js(without("instruction", id=lambda row: 1)), "no column is the instruction"),
    "two outputs": (
        ".json", js(without("output", answer=lambda row: "gold", prediction=said_in)),
        "--column output=answer or --column output=prediction",
    ),
    "two instructions": (
        ".csv", csv(without("instruction", prompt=lambda row: row["instruction"] * 2, question=asked_in)),
        "--column instruction=prompt or --column instruction=question",
    ),
    "several samples": (".json", js(with_output(lambda row: [row["output"]] * 2)), "7 x several texts: keep one"),
    "null": (".json", js([*ROWS[1:], {**ROWS[0], "output": None}]), "1 x null", "--count-missing"),
    "not there": (".jsonl", lines([*ROWS[1:], {"instruction": ASKED[0]}]), "1 x not there", "--count-missing"),
    "NaN": (".json", js(with_output(lambda row: float("nan"))), "7 of 7 rows", "7 x NaN"),
    "numbers": (".json", js(with_output(lambda row: 4)), "7 x a number", "--count-missing"),
    "no instruction in a row": (".json", js([*ROWS, {"output": "a"}]), "1 of 8 rows", "under instruction (rows 7"),
    "messages that end in the user's": (".json", js(with_output(lambda row: turns(row)[:1])), "one of the assistant"),
    "messages of another question": (
        ".json", js(with_output(lambda row: [said("user", "Another one"), *turns(row)])), "something else than"
    ),
    "an object": (".json", js(with_output(lambda row: {"text": row["output"]})), "7 x an object with the keys text"),
    "ids in place of instructions": (
        ".jsonl", lines([{"question_id": str(n), "choices": [{"turns": ["a"]}]} for n in range(7)]),
        "no column is the instruction; there are question_id, choices", "write these into the file",
    ),
    "an instruction twice": (
        ".json", js([*ROWS, ROWS[3]]), "1 outputs are of instructions that the reference has less often, e.g. 'Name a r"
    ),
    "a count that is none": (
        ".csv", csv(without(n_tokens=lambda row: "many")), "expected a number of tokens", "--column n_tokens="
    ),
    "a part": (".json", js(ROWS[:3]), "4 instructions of the reference have no output", "--subset", "'m' in "),
    "other instructions": (".json", js(asked_as(lambda text: text[::-1])), "7 outputs have no reference"),
    "an input that is no text": (".json", js(without(input=lambda row: 5)), "input is not a string"),
}  # fmt: skip


@pytest.fixture(scope="module")
def server():
    with ScriptedJudge() as judge:
        yield judge


@pytest.fixture
def judge(server, tmp_path, monkeypatch, capsys):
    """`otpo judge` in this process: (exit code, standard error)."""
    (tmp_path / "reference.json").write_bytes(js(REFERENCE))

    def run(*arguments, reference=tmp_path / "reference.json"):
        monkeypatch.setattr(sys, "argv", [
            *("otpo", "judge", "--judge-url", server.url, "--judge-model", "test", "--out", str(tmp_path / "board")),
            *("--reference", str(reference), *map(str, arguments)),
        ])  # fmt: skip
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, capsys.readouterr().err

    return run


def write(folder, shapes):
    """NAME=FILE of each shape."""
    for number, (name, content) in enumerate(shapes.values()):
        (folder / f"{number}{name}").write_bytes(content)
    return [f"{shape}={folder / f'{number}{name}'}" for number, (shape, (name, _)) in enumerate(shapes.items())]


def assert_equal_numbers(folder, names):
    """Every model of the board has the numbers of the first one, and the same verdicts about the same texts."""
    board = pd.read_csv(folder / "leaderboard.csv").set_index("name").loc[names]
    own = ["avg_tokens", "truncation_rate", "detectable_difference", "prompts_needed"]  # not every model has them
    own += [column for column in board if column.startswith("judge_")]  # one pays for all
    numbers = board.drop(columns=own)
    for name in names:
        pd.testing.assert_series_equal(numbers.loc[name], numbers.iloc[0], check_names=False)
    verdicts = pd.read_parquet(folder / "verdicts.parquet")
    told = ["index", "instruction_hash", "output_hash", "reference_hash", "preference"]
    each = {name: frame[told].reset_index(drop=True) for name, frame in verdicts.groupby("generator")}
    for name in names:
        pd.testing.assert_frame_equal(each[name], each[names[0]])


@pytest.mark.parametrize("shape", READ)
def test_every_shape_that_is_read_gives_the_same_pairs(tmp_path, shape):
    name, content = READ[shape]
    (tmp_path / f"a{name}").write_bytes(content)
    read = read_outputs(tmp_path / f"a{name}")
    rows = with_instructions_of(read.rows, REFERENCE)[0]
    pairs = [(pair.instruction, pair.output, pair.reference) for pair in match_outputs(rows, REFERENCE)]
    assert pairs == [
        (ours["instruction"], ours["output"], theirs["output"]) for ours, theirs in zip(ROWS, REFERENCE, strict=True)
    ]
    assert not read.unread and {row.get("generator", "m") for row in rows} <= {"m"}


@pytest.mark.slow
def test_every_shape_that_is_read_gives_the_same_numbers(judge, tmp_path):
    code, said_to_user = judge(*write(tmp_path, READ))
    assert code == 0, said_to_user
    assert_equal_numbers(tmp_path / "board", list(READ))
    assert pd.read_csv(tmp_path / "board" / "leaderboard.csv")["avg_length"].iloc[0] == sum(
        len(row["output"]) for row in ROWS
    ) // len(ROWS)
    for words in (
        "instruction is the column question, output is the column prediction",
        "output is the column output_2, generator is the column generator_2",
        "instruction and output are of the messages in conversations",
        "7 instructions that differ from the reference's in white space",
    ):
        assert words in said_to_user


def test_columns_of_other_names_are_read_with_a_mapping(judge, tmp_path):
    shapes = {"plain": READ["list"], **MAPPED}
    code, said_to_user = judge(*write(tmp_path, shapes), "--column", "instruction=frage", "--column", "output=antwort")
    assert code == 0, said_to_user
    assert_equal_numbers(tmp_path / "board", list(shapes))
    assert "instruction is the column frage, output is the column antwort" in said_to_user


@pytest.mark.parametrize("shape", REFUSED)
def test_every_other_shape_is_refused_in_one_message(judge, tmp_path, server, shape):
    name, content, *words = REFUSED[shape]
    (tmp_path / f"a{name}").write_bytes(content)
    calls = len(server.calls)
    code, said_to_user = judge(tmp_path / f"a{name}")
    assert code == 2 and said_to_user.startswith("error: ") and said_to_user.count("\n") == 1, said_to_user
    assert all(word in said_to_user for word in words), said_to_user
    assert len(said_to_user) < 1500 and len(server.calls) == calls


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("antwort=output", "'antwort' is nothing that a column of outputs can be: expected instruction, output"),
        ("output=antwort", "no file has a column antwort; there are dataset, instruction, output, generator"),
        ("note=", "no file has a column note"),
        ("output", "expected WHAT=COLUMN"),
    ],
)
def test_a_mapping_that_cannot_be_is_refused(judge, tmp_path, option, words):
    code, said_to_user = judge(*write(tmp_path, {"list": READ["list"]}), "--column", option)
    assert code == 2 and words in said_to_user


# ---- rows without an output ----


def test_rows_without_an_output_count_as_prompts_without_a_verdict(judge, tmp_path):
    """The numbers are those of the other rows alone, and the missing ones are counted and bounded."""
    gaps = [{**ROWS[0], "output": None}, {**ROWS[1], "output": float("nan")}, {**ROWS[2], "output": 4}]
    gaps.append({"instruction": ASKED[3], "generator": "m"})
    reference = [*REFERENCE[:6], {**REFERENCE[6], "output": None}]
    (tmp_path / "gaps.json").write_bytes(json.dumps([*gaps, *ROWS[4:]]).encode())
    (tmp_path / "there.json").write_bytes(js(ROWS[4:6]))
    (tmp_path / "lost.json").write_bytes(js(reference))
    files = [tmp_path / "gaps.json", f"there={tmp_path / 'there.json'}", "--subset"]
    code, said_to_user = judge(*files, "--count-missing", reference=tmp_path / "lost.json")
    assert code == 0 and "4 of 7 rows have no output (1 x null, 1 x NaN, 1 x a number, 1 x not there)" in said_to_user
    assert "1 of 7 rows have no output (1 x null): counted as prompts without a verdict" in said_to_user
    board = pd.read_csv(tmp_path / "board" / "leaderboard.csv").set_index("name")
    ours, there = board.loc["m"], board.loc["there"]
    for column in (
        "win_rate",
        "standard_error",
        "avg_length",
        "reference_length",
        "length_adjusted_winrate",
        "n_total",
    ):
        assert ours[column] == there[column]
    assert ours["n_failed"] == 5 and there["n_failed"] == 0 and ours["n_total"] == 2
    assert ours["win_rate_if_missing_lost"] == pytest.approx(ours["win_rate"] * 2 / 7)
    assert ours["win_rate_if_missing_won"] == pytest.approx((ours["win_rate"] * 2 + 500) / 7)
    verdicts = pd.read_parquet(tmp_path / "board" / "verdicts.parquet").query("generator == 'm'")
    assert verdicts["error"].value_counts().to_dict() == {"no_output": 4, "no_reference": 1}
    page = (tmp_path / "board" / "report.html").read_text()
    assert "no_output" in page and ">None<" not in page


def test_a_model_of_which_every_output_is_missing_leaves_the_board_whole(judge, tmp_path):
    (tmp_path / "none.json").write_bytes(js([{**row, "output": None, "generator": "none"} for row in ROWS]))
    code, said_to_user = judge(*write(tmp_path, {"m": READ["list"]}), tmp_path / "none.json", "--count-missing")
    assert code == 0, said_to_user
    board = pd.read_csv(tmp_path / "board" / "leaderboard.csv").set_index("name")
    assert board.loc["none", "n_failed"] == 7 and board["win_rate"].isna().to_dict() == {"m": False, "none": True}
    code, said_to_user = judge(tmp_path / "none.json", "--count-missing")
    assert code == 1 and "7 x no_output" in said_to_user and "Traceback" not in said_to_user


def test_empty_outputs_are_judged_and_said(judge, tmp_path):
    (tmp_path / "empty.csv").write_bytes(csv([{**ROWS[0], "output": ""}, *ROWS[1:]]))
    code, said_to_user = judge(tmp_path / "empty.csv")
    assert code == 0 and "1 of 7 outputs are empty texts, and are judged as they are" in said_to_user
    assert pd.read_csv(tmp_path / "board" / "leaderboard.csv")["n_total"].item() == 7


# ---- names ----

AWKWARD = [
    "..", "a/b", "a-b", "NA", "na", "x" * 1000, "x" * 999, "base", "null", "../../out", "a=b", "M", "m", "m ", "\ud83d",
    "a\nb", "a\rb", "zero\x00", "1.0", "1", "=1+1", "<b>&amp;", "é", unicodedata.normalize("NFD", "é"), "[red]x",
    "[/red]",
]  # fmt: skip


def test_generators_of_any_name_are_models_of_their_own(judge, tmp_path):
    rows = [{**row, "generator": name} for name in AWKWARD for row in ROWS[:3]]
    (tmp_path / "reference.json").write_bytes(js(REFERENCE[:3]))
    (tmp_path / "many.json").write_text(json.dumps(rows))
    before = {path for path in tmp_path.iterdir()}
    code, said_to_user = judge(tmp_path / "many.json")
    assert code == 0, said_to_user
    names = ["\ufffd" if name == "\ud83d" else name for name in AWKWARD]
    board = read_leaderboard(tmp_path / "board" / "leaderboard.csv")
    assert sorted(board["name"]) == sorted(names) and (board["n_total"] == 3).all() and board["win_rate"].nunique() == 1
    found = read_run(tmp_path / "board").outputs["alpaca_eval"]
    assert all([row["output"] for row in found[name]] == [row["output"] for row in ROWS[:3]] for name in names)
    assert {path for path in tmp_path.iterdir()} - before == {tmp_path / "board"}


def test_a_row_without_a_generator_belongs_to_the_model_that_its_file_is_called(judge, tmp_path):
    names = [None, "", " ", float("nan"), 0, True, ["x"]]
    rows = [{**row, "generator": name} for name, row in zip(names, ROWS, strict=True)]
    (tmp_path / "file.v2.json").write_text(json.dumps(rows))
    code, said_to_user = judge(tmp_path / "file.v2.json", "--subset")
    assert code == 0, said_to_user
    board = read_leaderboard(tmp_path / "board" / "leaderboard.csv").set_index("name")
    assert board["n_total"].to_dict() == {"file": 4, "0": 1, "True": 1, "['x']": 1}


def test_a_reference_of_several_generators_has_one_name_and_all_its_rows(judge, tmp_path):
    people = [{**row, "generator": name} for name, row in zip("aabbab", REFERENCE, strict=False)]
    (tmp_path / "people.json").write_bytes(js([*people, {key: REFERENCE[6][key] for key in ("instruction", "output")}]))
    code, said_to_user = judge(*write(tmp_path, {"m": READ["list"]}), reference=tmp_path / "people.json")
    assert code == 0 and "outputs of 2 generators are the reference, which is called people" in said_to_user
    board = read_leaderboard(tmp_path / "board" / "leaderboard.csv")
    assert board["reference"].tolist() == ["people"] and board["n_total"].tolist() == [7]


def test_name_and_file_rename_a_model(judge, tmp_path):
    (tmp_path / "lr=0.1.json").write_bytes(js(ROWS))
    (tmp_path / "two.json").write_bytes(js([{**row, "generator": str(n)} for n, row in enumerate(ROWS)]))
    path, two = tmp_path / "lr=0.1.json", tmp_path / "two.json"
    code, said_to_user = judge(path, path)
    assert code == 2 and f"Two files hold outputs of 'm'. Name the models: NAME=FILE, as in one={path}" in said_to_user
    assert "expected the path of a file, or NAME=FILE" in judge("=x")[1]
    assert "no_such.json" in judge("one=no_such.json")[1]
    code, said_to_user = judge(path, f"one={path}", f"lr=0.2={path}", f"all of them={two}")
    assert code == 0, said_to_user
    board = read_leaderboard(tmp_path / "board" / "leaderboard.csv")
    assert set(board["name"]) == {"m", "one", "lr=0.2", "all of them"} and (board["n_total"] == 7).all()


# ---- anything at all ----

COLUMNS = st.sampled_from([
    *("instruction", "output", "generator", "input", "prompt", "response", "messages", "output_1", "output_2"),
    *("n_tokens", "truncated", "model", "conversations", "Output", "data", "columns", ""),
])  # fmt: skip
TEXT = st.text(st.characters(), max_size=6) | st.sampled_from([*ASKED, "[]", "{}", '[{"role": "user"}]', "\ud83d"])
CELL = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers(-(10**20), 10**20) | TEXT,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "0"]) | TEXT, inner, max_size=3)
        | st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "x"]), "content": inner})
    ),
    max_leaves=6,
)
TABLE = st.lists(st.dictionaries(COLUMNS, CELL, max_size=5) | CELL, min_size=1, max_size=4)
FUZZED = settings(max_examples=150, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


def read_or_refused(path, **how):
    """What was read is whole; None where it was refused in a message of one line."""
    try:
        read = read_outputs(path, **how)
    except UserError as error:
        assert "\n" not in str(error).strip() and len(str(error)) < 2000
        return None
    assert all(isinstance(row["instruction"], str) and isinstance(row["output"], str | None) for row in read.rows)
    assert sum(row["output"] is None for row in read.rows) == read.unread.total()
    json.dumps(read.rows, default=str).encode("ascii")
    "".join(text for row in read.rows for text in (row["instruction"], row["output"] or "")).encode("utf-8")
    return read


@FUZZED
@given(TABLE | st.dictionaries(COLUMNS, CELL | TABLE, max_size=4), st.booleans(), st.booleans())
def test_any_json_is_read_or_refused(tmp_path_factory, value, reference, count_missing):
    path = tmp_path_factory.mktemp("any", numbered=True) / "a.json"
    path.write_text(json.dumps(value))
    read_or_refused(path, reference=reference, count_missing=count_missing)


@FUZZED
@given(st.sampled_from(list(READ)), st.integers(0, 10**6), st.binary(max_size=4), st.integers(0, 20))
def test_a_damaged_file_is_read_or_refused(tmp_path_factory, shape, place, put, cut):
    name, content = READ[shape]
    at = place % len(content)
    path = tmp_path_factory.mktemp("damaged", numbered=True) / f"a{name}"
    path.write_bytes(content[:at] + put + content[at + cut :])
    read_or_refused(path, count_missing=True)


@settings(FUZZED, max_examples=4)
@given(
    st.dictionaries(
        st.text(st.characters(), max_size=8), st.lists(TEXT | CELL, min_size=2, max_size=2), min_size=1, max_size=3
    )
)
def test_any_names_and_outputs_are_judged(tmp_path_factory, server, models):
    folder = tmp_path_factory.mktemp("judged", numbered=True)
    rows = [
        {"instruction": text, "output": cell, "generator": name}
        for name, cells in models.items()
        for text, cell in zip(ASKED[:2], cells, strict=True)
    ]
    (folder / "a.json").write_text(json.dumps(rows))
    (folder / "r.json").write_bytes(js(REFERENCE[:2]))
    config = JudgeConfig(url=server.url, model="test", count_missing=True)
    try:
        board = judge_files([str(folder / "a.json")], folder / "r.json", config, folder / "out", "t", progress=silent)
    except (UserError, WorkError):
        return
    assert board["n_total"].sum() + board["n_failed"].sum() == len(rows)
