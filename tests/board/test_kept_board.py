"""A leaderboard that is kept in a folder: only new verdicts are paid, nothing is mixed, and a kill costs nothing."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml
from support.html_page import assert_sound
from support.servers import (
    Reply,
    ScriptedJudge,
    completion,
    fenced_texts,
    replay,
    serve_batch,
    share,
    write_lines,
)

from eval.published.lm_eval import read_results
from jobs.cli import main
from otpo.errors import UserError

N = 12


def rows(name: str, n: int = N) -> list[dict]:
    return [
        {"instruction": f"Question {i}", "output": f"{name} says {i}. " * (1 + i % 3), "generator": name}
        for i in range(n)
    ]


def opinion(call):
    """Each judge prefers by a hash of its name and the output."""
    model = call.body["model"]
    _, first, second = fenced_texts(call.body["messages"][-1]["content"])
    first, second = share(model + first), share(model + second)
    p = first / (first + second)
    return {**completion("m" if p > 0.5 else "M", {"m": p, "M": 1 - p}), "model": model}


class Desk:
    """A person at a folder with files of outputs, and a judge behind real HTTP."""

    def __init__(self, folder: Path, server: ScriptedJudge, capsys, monkeypatch):
        self.folder, self.server, self.capsys, self.monkeypatch = folder, server, capsys, monkeypatch
        self.board = folder / "board"
        monkeypatch.chdir(folder)
        for name in ("reference", "one", "two", "three"):
            self.write(f"{name}.json", rows(name))

    def write(self, name: str, what) -> Path:
        (self.folder / name).write_text(json.dumps(what))
        return self.folder / name

    def otpo(self, *words: object) -> tuple[int, str]:
        """The exit code, and all that is said."""
        self.monkeypatch.setattr(sys, "argv", ["otpo", *map(str, words)])
        with pytest.raises(SystemExit) as exit:
            main()
            sys.exit(0)
        said = self.capsys.readouterr()
        return exit.value.code or 0, said.out + said.err

    def __call__(self, verb: str, *words: object) -> str:
        code, said = self.otpo("board", verb, self.board, *words)
        assert code == 0, said
        return said

    def refused(self, *words: object) -> str:
        """What a command says that changes nothing and asks nothing."""
        before, calls = self.files(), len(self.server.calls)
        code, said = self.otpo("board", *words)
        assert code == 2 and "Traceback" not in said, said
        assert self.files() == before and len(self.server.calls) == calls
        return said

    def files(self) -> dict[str, str]:
        """What lies in the board's folder, but for the store's own files."""
        found = [path for path in self.board.rglob("*") if path.is_file() and "sqlite" not in path.name]
        return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}

    def init(self, *words: object) -> None:
        self("init", "--reference", "reference.json", "--judge-url", self.server.url, "--judge-model", "a", *words)

    @property
    def state(self) -> dict:
        return yaml.safe_load((self.board / "board.yaml").read_text())

    @property
    def table(self) -> pd.DataFrame:
        return pd.read_csv(self.board / "leaderboard.csv").set_index("name")

    @property
    def asked(self) -> int:
        """Questions about outputs, without those that find out how the judge is asked."""
        return questions(self.server)


@pytest.fixture
def desk(tmp_path, capsys, monkeypatch):
    with ScriptedJudge(opinion) as server:
        yield Desk(tmp_path, server, capsys, monkeypatch)


def test_a_board_is_that_of_otpo_judge_and_only_new_verdicts_are_paid(desk):
    desk.init()
    assert desk.asked == 0 and len(desk.table) == 0
    desk("add", "one.json")
    assert desk.asked == N
    desk("add", "two.json", "renamed=three.json")
    assert desk.asked == 3 * N
    whole = desk.folder / "whole"
    code, said = desk.otpo(
        *("judge", "one.json", "two.json", "renamed=three.json", "--reference", "reference.json", "--out", whole),
        *("--judge-url", desk.server.url, "--judge-model", "a"),
    )
    assert code == 0, said
    ours, theirs = (pd.read_csv(folder / "leaderboard.csv") for folder in (desk.board, whole))
    pd.testing.assert_frame_equal(ours, theirs)
    page = assert_sound(desk.board / "report.html").words()
    assert page == assert_sound(whole / "report.html").words().replace("whole", "board")
    assert "report.html" in (desk.board / "index.html").read_text()
    calls = desk.asked
    desk("add", "one.json", "two.json")  # what is there is not asked again
    desk("update")
    desk("build")
    assert desk.asked == calls
    pd.testing.assert_frame_equal(ours, pd.read_csv(desk.board / "leaderboard.csv"))
    one = desk.state["models"]["one"]
    outputs = desk.board / "models" / "one" / "alpaca_eval" / "model_outputs.json"
    assert one["file"] == "one.json" and one["outputs"] == N
    assert one["sha256"] == hashlib.sha256(outputs.read_bytes()).hexdigest()


@pytest.mark.slow
def test_a_model_that_is_taken_off_leaves_nothing_and_comes_back_for_nothing(desk):
    desk.init()
    desk("add", "one.json", "two.json", "three.json")
    before, calls = desk.table, desk.asked
    said = desk("remove", "two")
    assert "Removed: two" in said and list(desk.table.index) == [name for name in before.index if name != "two"]
    assert set(pd.read_parquet(desk.board / "verdicts.parquet")["generator"]) == {"one", "three"}
    assert not [path for path in desk.board.rglob("*") if "two" in path.name]
    assert "two says" not in assert_sound(desk.board / "report.html").words()
    desk("add", "two.json")
    pd.testing.assert_frame_equal(desk.table, before)
    desk("remove", "one", "two", "three")
    assert len(desk.table) == 0 and desk.state["models"] == {}
    assert_sound(desk.board / "report.html")
    assert desk.asked == calls


@pytest.mark.slow
def test_new_outputs_of_a_model_take_its_place_on_request_alone(desk):
    desk.init()
    desk("add", "one.json", "two.json")
    changed = [row | {"output": "Better."} if i < 3 else row for i, row in enumerate(rows("one"))]
    desk.write("newer.json", changed)
    said = desk.refused("add", desk.board, "newer.json")
    assert "one.json" in said and "newer.json" in said and "3 of 12" in said and "--replace" in said
    calls = desk.asked
    desk("add", "newer.json", "--replace")
    assert desk.asked == calls + 3  # the other outputs' verdicts are there
    assert desk.state["models"]["one"]["file"] == "newer.json"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--judge-model", "b"], ["--judge-model is a on the board, and b is asked for", "otpo board rejudge"]),
        (["--protocol", "summary"], ["--protocol is preference on the board, and summary is asked for"]),
        (["--set", "judge.both_orders=true"], ["judge.both_orders is false on the board, and true is asked for"]),
        (["--set", "judge.panel=[{model: c}]"], ["judge.panel is not set on the board"]),
        (["--set", "judge.seed=1"], ["judge.seed is 0 on the board, and 1 is asked for"]),
    ],
)
def test_another_judge_or_protocol_is_refused(desk, words, said):
    desk.init()
    desk("add", "one.json")
    told = desk.refused("add", desk.board, "two.json", *words)
    assert all(word in told for word in said), told
    told = desk.refused("update", desk.board, *words)
    assert all(word in told for word in said), told


def test_what_does_not_fit_is_refused_in_one_message(desk):
    desk.init()
    desk("add", "one.json")
    desk.write("short.json", rows("short", N - 1))
    desk.write("foreign.json", [row | {"instruction": "Else"} for row in rows("foreign")[:1]])
    desk.write("with_input.json", [row | {"input": "Mind this."} for row in rows("with_input")])
    for words, parts in (
        (["add", desk.board, "short.json"], ["'short' in short.json", "1 instructions of the", "otpo board init"]),
        (["add", desk.board, "foreign.json"], ["1 outputs have no reference", "otpo board init"]),
        (["add", desk.board, "with_input.json"], ["`input`", "asked something else"]),
        (["add", desk.board, "nowhere.json"], ["nowhere.json", "found nothing there"]),
        (["add", desk.board, "x=one.json", "x=two.json"], ["Two files hold outputs of 'x'"]),
        (["add", desk.folder / "none", "one.json"], ["none is no kept leaderboard", "otpo board init"]),
        (["add", "s3://bucket/board", "one.json"], ["s3:/bucket/board: expected a path"]),
        (["remove", desk.board, "nobody"], ["'nobody' is neither", "There are: one"]),
        (["rejudge", desk.board], ["is judged by a in this way already", "otpo board update"]),
        (["rejudge", desk.board, "--set", "judge.nonsense=1"], ["there is no such key"]),
        (["init", desk.board, "--reference", "two.json", "--judge-url", desk.server.url, "--judge-model", "b"],
         ["judge-model is a on the board, and b", "the reference is reference of reference.json", "another folder"]),
        (["init", desk.board, "--reference", "reference.json", "--judge-url", desk.server.url, "--judge-model", "a",
          "--task", "other"], ["the task is alpaca_eval on the board"]),
        (["init", desk.folder, "--reference", "reference.json"], ["Who judges?"]),
    ):  # fmt: skip
        told = desk.refused(*words)
        assert all(part in told for part in parts), told
    assert not (desk.folder / "none").exists()


@pytest.mark.slow
def test_a_folder_of_otpo_judge_is_not_taken_over(desk):
    asked = ["--reference", "reference.json", "--judge-url", desk.server.url, "--judge-model", "a"]
    assert desk.otpo("judge", "one.json", *asked, "--out", desk.board)[0] == 0
    assert "what `otpo judge` wrote" in desk.refused("init", desk.board, *asked)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("models: [", "cannot be read"),
        ("just words", "expected keys such as judge and models"),
        ("format: 2\n", "expected format 1, found 2"),
        ("task: t\n", "judge: Field required"),
        ("\x00", "cannot be read"),
    ],
)
def test_a_broken_state_is_told(desk, text, said):
    desk.init()
    (desk.board / "board.yaml").write_text(text)
    for verb in ("add", "build"):
        told = desk.refused(verb, desk.board, *(["one.json"] if verb == "add" else []))
        assert "board.yaml" in told and said in told


@pytest.mark.slow
def test_outputs_that_were_changed_or_lost_are_told(desk):
    desk.init()
    desk("add", "one.json", "two.json")
    outputs = desk.board / "models" / "one" / "alpaca_eval" / "model_outputs.json"
    whole = outputs.read_text()
    outputs.write_text(whole.replace("says 3", "says 4"))
    assert "are not those that were added" in desk.refused("update", desk.board)
    outputs.unlink()
    assert "the outputs of one are gone" in desk.refused("build", desk.board)
    outputs.write_text(whole)
    desk("update")
    shutil.rmtree(outputs.parent)
    desk("remove", "one")
    assert list(desk.table.index) == ["two"]


@pytest.mark.slow
def test_another_judge_takes_over_the_whole_board_and_the_old_one_comes_back_for_nothing(desk):
    desk.init()
    desk("add", "one.json", "two.json", "three.json")
    before, calls = desk.table, desk.asked
    said = desk("rejudge", "--judge-model", "b")
    assert "b and a name the same winner" in said and desk.asked == 2 * calls
    assert set(desk.table["judge"]) == {"b"} and desk.state["judge"]["model"] == "b"
    found = json.loads((desk.board / "migration.json").read_text())
    old = {row["name"]: row["old_win_rate"] for row in found["models"]}
    assert old == pytest.approx(before["win_rate"].to_dict()) and found["n"] == 3 * N
    assert "judge-model is b on the board" in desk.refused("add", desk.board, "one.json", "--judge-model", "a")
    desk("rejudge", "--judge-model", "a", "--set", "judge.both_orders=true")
    assert desk.asked == 3 * calls  # one of the two orders is known
    assert "a now and a before name the same winner" in desk("rejudge", "--set", "judge.both_orders=false")
    assert desk.asked == 3 * calls
    pd.testing.assert_frame_equal(desk.table, before)


@pytest.mark.slow
def test_failed_verdicts_are_asked_again_and_nothing_else_is(desk):
    broken = {"Question 3", "Question 7"}
    desk.server.script = lambda call: (
        Reply({"error": {"message": "flagged by moderation"}}, 400)
        if fenced_texts(call.body["messages"][-1]["content"])[0].strip() in broken
        else opinion(call)
    )
    desk.init()
    said = desk("add", "one.json", "two.json")
    assert "4 of 24 verdicts failed" in said and set(desk.table["n_failed"]) == {2}
    calls = desk.asked
    desk.server.script = opinion
    desk("update")
    assert desk.asked == calls + 4 and set(desk.table["n_failed"]) == {0}


@pytest.mark.slow
def test_a_judge_that_cannot_be_asked_leaves_the_board_as_it_was(desk):
    desk.init()
    desk("add", "one.json")
    desk.server.script = lambda call: Reply({"error": {"message": "wrong key"}}, 401)
    before = desk.files()
    shutil.move(desk.board / "store.sqlite", desk.folder / "store.sqlite")  # what is known of the endpoint
    code, said = desk.otpo("board", "add", desk.board, "two.json", "--set", "judge.timeout=7", "--judge-url",
                           desk.server.url.replace("127.0.0.1", "localhost"))  # fmt: skip
    assert code == 2 and "refused the key" in said and desk.files() == before


def named(model: str, *refused: str):
    """As `opinion`, from an endpoint that calls its model so, and refuses questions about these outputs."""

    def script(call):
        asked = call.body["messages"][-1]["content"]
        if any(text in asked for text in refused):
            return Reply({"error": {"message": "flagged by moderation"}}, 400)
        return {**opinion(call), "model": model}

    return script


def questions(server: ScriptedJudge) -> int:
    return sum("Question" in call.body["messages"][-1]["content"] for call in server.calls)


@pytest.mark.slow
def test_a_name_that_answers_as_another_model_stops_the_board_until_somebody_decides(desk):
    desk.server.script = named("a-2025")
    desk.init()
    desk("add", "one.json", "two.json")
    desk.server.script = named("a-2026")
    said = desk("add", "three.json")
    assert "a-2025 gave 24 verdicts, a-2026 gave 12 verdicts" in said and "--renew" in said
    for words in (["add", desk.board, "one.json"], ["update", desk.board]):
        assert "come to answer as another model" in desk.refused(*words)
    calls = desk.asked
    desk("update", "--renew")
    assert desk.asked == calls + 2 * N  # what it has judged is not asked again
    assert set(pd.read_parquet(desk.board / "verdicts.parquet")["judge_model"]) == {"a-2026"}
    desk("update")
    assert desk.asked == calls + 2 * N


@pytest.mark.slow
def test_a_judge_of_a_panel_that_answers_as_another_model_stops_the_board_too(desk):
    desk.server.script = named("a-2025")
    with ScriptedJudge(named("c-2025", "one says 3")) as other:
        desk.init("--set", f"judge.panel=[{{model: c, url: '{other.url}'}}]")
        said = desk("add", "one.json", "two.json")
        assert "1 of 24 verdicts failed" in said and questions(other) == 2 * N
        other.script = named("c-2026")
        said = desk("update")  # asks what is missing and nothing that the other model has judged
        assert questions(other) == 2 * N + 1 and desk.asked == 2 * N
        assert "The judge c of" in said and "c-2025 gave 23 verdicts, c-2026 gave 1 verdicts" in said
        assert "a-2025 gave" not in said and "--renew" in said
        page = assert_sound(desk.board / "report.html").words()
        assert "The judge's name c answers as several models: c-2025 (23), c-2026 (1)" in page
        for words in (["add", desk.board, "three.json"], ["update", desk.board]):
            assert "come to answer as another model" in desk.refused(*words)
        assert questions(other) == 2 * N + 1
        desk("update", "--renew")
        assert questions(other) == 2 * N + 1 + 2 * N - 1 and desk.asked == 2 * N
        found = pd.read_parquet(desk.board / "verdicts.parquet")["judge_model"]
        assert set(found) == {'{"a": "a-2025", "c": "c-2026"}'}
        desk("add", "three.json")
        desk("update")
        assert questions(other) == 5 * N and desk.asked == 3 * N
        assert json.loads((desk.board / "panel.json").read_text())["pairs"][0]["n"] == 3 * N
        (desk.board / "panel" / "c.parquet").unlink()
        desk("update")  # what each judge said is in the store too
        assert (desk.board / "panel" / "c.parquet").exists() and questions(other) == 5 * N


def test_a_model_is_added_through_batch_files(desk):
    desk.init()
    desk("add", "one.json")
    before, calls = desk.files(), desk.asked
    said = desk("add", "two.json", "--batch-write", "batch.jsonl")
    assert "12 requests in batch.jsonl" in said and "--batch-read" in said
    assert desk.files() == before and desk.asked == calls  # nothing is asked, and the board is as it was
    answers = serve_batch(desk.folder / "batch.jsonl", desk.server.url)
    calls = desk.asked
    write_lines(desk.folder / "out.jsonl", answers[1:])
    said = desk("add", "two.json", "--batch-read", "out.jsonl")
    assert "11 replies used" in said and "1 questions are in no line of it" in said
    assert desk.table["n_failed"].to_dict() == {"one": 0, "two": 1}
    assert "1 requests in rest.jsonl" in desk("update", "--batch-write", "rest.jsonl")
    assert "1 calls" in desk("update", "--dry-run") and desk.asked == calls
    assert "1 calls" in desk("add", "one.json", "--dry-run")  # which asks about all that is missing
    write_lines(desk.folder / "rest_out.jsonl", answers[:1])
    desk("update", "--batch-read", "rest_out.jsonl")
    assert "nothing to write" in desk("update", "--batch-write", "none.jsonl")
    assert desk.asked == calls and desk.table["n_failed"].to_dict() == {"one": 0, "two": 0}
    through_files, desk.board = desk.table, desk.folder / "asked"
    desk.init()
    desk("add", "one.json", "two.json")
    pd.testing.assert_frame_equal(desk.table, through_files)


@pytest.mark.slow
def test_another_judge_takes_over_through_batch_files(desk):
    desk.init()
    desk("add", "one.json", "two.json")
    before = desk.files()
    said = desk("rejudge", "--judge-model", "b", "--batch-write", "batch.jsonl")
    assert "24 requests in batch.jsonl" in said and desk.files() == before and desk.state["judge"]["model"] == "a"
    write_lines(desk.folder / "out.jsonl", serve_batch(desk.folder / "batch.jsonl", desk.server.url))
    calls = desk.asked
    assert "b and a name the same winner" in desk("rejudge", "--judge-model", "b", "--batch-read", "out.jsonl")
    assert desk.asked == calls and set(desk.table["judge"]) == {"b"}
    through_files = desk.table
    desk("rejudge", "--judge-model", "a")
    desk("rejudge", "--judge-model", "b")
    assert desk.asked == calls
    pd.testing.assert_frame_equal(desk.table, through_files)


@pytest.mark.slow
def test_a_batch_that_cannot_be_is_refused(desk):
    desk.init("--set", "judge.panel=[{model: c}]")
    write_lines(desk.folder / "out.jsonl", ["no batch\n"])
    for words, said in (
        (["--batch-write", "b.jsonl"], "A batch is for one model"),
        (["--batch-write", "b.jsonl", "--dry-run"], "--batch-write and --dry-run: keep one"),
        (["--dry-run", "--judge-vllm", "m"], "--dry-run and --judge-vllm: keep one"),
    ):
        assert said in desk.refused("add", desk.board, "one.json", *words)
    desk.board = desk.folder / "single"
    desk.init()
    for file, said in (("out.jsonl", "expected lines of a batch's output"), ("gone.jsonl", "No such file")):
        assert said in desk.refused("add", desk.board, "one.json", "--batch-read", file)


@pytest.mark.slow
def test_a_board_with_its_own_protocol_and_a_panel_can_be_moved(desk):
    (desk.folder / "mine").mkdir()
    (desk.folder / "mine" / "strict.yaml").write_text("name: strict\nlike: preference\ntemplate: strict.txt\n")
    template = "Which is better, m or M?\n```\n{instruction}\n```\nm:\n```\n{output_1}\n```\nM:\n```\n{output_2}\n```\n"
    (desk.folder / "mine" / "strict.txt").write_text(template)
    desk.init("--protocol", "mine/strict.yaml", "--set", "judge.panel=[{model: c}]")
    desk("add", "one.json", "two.json")
    shutil.rmtree(desk.folder / "mine")
    desk.board = desk.board.rename(desk.folder / "moved")
    desk("add", "three.json")
    assert desk.asked == 3 * N * 2 and set(desk.table["judge"]) == {"mean of a and c"}
    assert desk.state["protocol"].startswith("strict-") and set(desk.table["protocol"]) == {desk.state["protocol"]}
    figures = json.loads((desk.board / "panel.json").read_text())
    assert figures["pairs"][0]["n"] == 3 * N
    page = assert_sound(desk.board / "report.html").words()
    assert "a and c name the same winner on" in page and "c and the panel name the same winner on" in page
    desk("remove", "one")
    assert json.loads((desk.board / "panel.json").read_text())["pairs"][0]["n"] == 2 * N
    (path,) = (desk.board / "protocol").glob("*.txt")
    path.write_text(template.replace("better", "worse"))
    told = desk.refused("add", desk.board, "one.json")
    assert "asks otherwise than when the board was judged" in told


@pytest.mark.slow
def test_names_of_any_kind_are_kept(desk):
    names = ["no", "1e5", "2024-01-01", "模型", "a/b", "x: y", "- z", "NA"]
    for n, name in enumerate(names):
        desk.write(f"{n}.json", [row | {"generator": name, "output": f"{n} {row['output']}"} for row in rows("m")])
    desk.init()
    desk("add", *(f"{n}.json" for n in range(len(names))))
    assert list(desk.state["models"]) == names
    found = pd.read_csv(desk.board / "leaderboard.csv", keep_default_na=False, dtype={"name": str})
    assert set(found["name"]) == set(names)
    desk("remove", *names[:4])
    assert list(desk.state["models"]) == names[4:]


# ---- kills, and two at once ----


@pytest.mark.slow
def test_a_kill_while_another_judge_takes_over_leaves_no_verdict_of_the_old_one(desk, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    desk.init()
    desk("add", "one.json")
    with monkeypatch.context() as patched:
        patched.setattr("jobs.boards.keeping.write_board", killed)
        assert desk.otpo("board", "rejudge", desk.board, "--judge-model", "b")[0] != 0
    calls = desk.asked
    desk("update")
    assert desk.asked == calls and set(desk.table["judge"]) == {"b"}
    after = desk.table
    desk("rejudge", "--judge-model", "a")
    desk("rejudge", "--judge-model", "b")
    pd.testing.assert_frame_equal(desk.table, after)
    assert desk.asked == calls


def command(*words: object, cwd: Path) -> subprocess.Popen:
    path = str(Path(__file__).resolve().parents[2])
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", "board", *map(str, words)], cwd=cwd, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip


@pytest.mark.slow
def test_a_kill_in_the_middle_of_add_costs_the_calls_in_flight_and_two_do_not_write_at_once(desk):
    desk.init("--concurrency", "2")
    desk("add", "one.json")
    before, calls = desk.files(), desk.asked
    desk.server.script = lambda call: Reply(opinion(call), delay=0.3)
    adding = command("add", desk.board, "two.json", "three.json", cwd=desk.folder)
    try:
        until = time.monotonic() + 120
        while desk.asked < calls + 8:
            assert adding.poll() is None and time.monotonic() < until, adding.stdout.read()
            time.sleep(0.05)
        told = desk.otpo("board", "remove", desk.board, "one")
        assert told[0] == 2 and "is being written by" in told[1]
    finally:
        adding.send_signal(signal.SIGKILL)
        adding.wait()
        adding.stdout.close()
    shown = {path: found for path, found in desk.files().items() if path in before and "board.yaml" not in path}
    assert all(before[path] == found for path, found in shown.items())  # the page is as it was
    answered = desk.server.answered
    said = desk("build")
    assert "two, three: not judged yet" in said and list(desk.table.index) == ["one"]
    assert desk.server.answered == answered
    desk.server.script = opinion
    desk("update")
    assert set(desk.table.index) == {"one", "two", "three"} and (desk.table["n_total"] == N).all()
    bodies = [json.dumps(call.body) for call in desk.server.calls]
    assert len(bodies) - len(set(bodies)) <= 2  # in flight when it was killed


# ---- what others published ----


def results(model: str, accuracy: float, **changes) -> dict:
    return {
        "model_name": f"org/{model}",
        "results": {
            "arc_easy": {"alias": "arc_easy", "sample_len": 9, "acc,none": accuracy, "acc_stderr,none": 0.01},
            "gsm8k": {"exact_match,strict-match": 0.3, "exact_match_stderr,strict-match": "N/A"},
        },
        "versions": {"arc_easy": 1.0, "gsm8k": 3.0},
        "n-shot": {"arc_easy": 0, "gsm8k": 5},
    } | changes


@pytest.mark.slow
def test_results_of_the_harness_are_columns_and_settings_that_differ_are_columns_of_their_own(desk):
    desk.init()
    desk("add", "one.json", "two.json")
    desk.write("lm_one.json", results("one", 0.5))
    desk.write("lm_two.json", results("elsewhere", 0.25, **{"n-shot": {"arc_easy": 5, "gsm8k": 5}}))
    samples = {"n-samples": {"arc_easy": {"original": 2376, "effective": 100}}}
    desk.write("part.json", results("one", 0.7, **samples))
    assert "has results of org/elsewhere" in desk.refused("import", desk.board, "lm_two.json")
    assert "has no model 'nobody'" in desk.refused("import", desk.board, "nobody=lm_two.json")
    said = desk("import", "lm_one.json", "two=lm_two.json", "part.json")
    assert "results of org/elsewhere, taken as those of two" in said
    table = desk.table
    assert table.loc["one", "lm_eval: arc_easy acc, 0-shot, version 1"] == 0.5
    assert table.loc["one", "lm_eval stderr: arc_easy acc, 0-shot, version 1"] == 0.01
    assert table.loc["two", "lm_eval: arc_easy acc, 5-shot, version 1"] == 0.25
    assert pd.isna(table.loc["two", "lm_eval: arc_easy acc, 0-shot, version 1"])
    assert table.loc["one", "lm_eval: arc_easy acc, 0-shot, version 1, 100 of 2376 samples"] == 0.7
    assert (table["lm_eval: gsm8k exact_match strict-match, 5-shot, version 3"] == 0.3).all()
    words = assert_sound(desk.board / "report.html").words()
    assert "lm_eval: gsm8k exact_match" in words and "0.300" in words
    before = desk.state
    desk("import", "lm_one.json")
    assert desk.state == before
    desk.write("again.json", results("one", 0.9))
    told = desk.refused("import", desk.board, "again.json")
    assert "lm_one.json" in told and "0.9 and 0.5" in told and "otpo board remove" in told
    desk.write("lm_one.json", results("one", 0.9))
    assert "--replace" in desk.refused("import", desk.board, "lm_one.json")
    desk("import", "lm_one.json", "--replace")
    assert desk.table.loc["one", "lm_eval: arc_easy acc, 0-shot, version 1"] == 0.9
    desk("remove", "one")  # its figures go with it
    assert [each["model"] for each in desk.state["imported"].values()] == ["two"]
    desk("remove", "lm_two.json")
    assert not [column for column in desk.table if column.startswith("lm_eval")]


PUBLISHED = """,win_rate,standard_error,n_wins,n_wins_base,n_draws,n_total,discrete_win_rate,mode,avg_length,\
length_controlled_winrate,lc_standard_error
strong,60.5,1.5,480,325,0,805,59.6,verified,2000,55.0,0.4
one,20.5,1.1,160,645,0,805,19.9,community,900,25.0,0.4
gpt4_1106_preview,50.0,0.0,0,0,805,805,50.0,minimal,2049,50.0,
"""


@pytest.mark.slow
def test_published_rows_stand_apart_from_a_board_that_is_judged_otherwise(desk):
    desk.init()
    desk("add", "one.json", "two.json")
    own = desk.table
    (desk.folder / "published.csv").write_text(PUBLISHED)
    (desk.folder / "older.csv").write_text(PUBLISHED.replace("gpt4_1106_preview", "text_davinci_003"))
    (desk.folder / "bare.csv").write_text("name,win_rate\none,3\n")
    (desk.folder / "twice.csv").write_text(PUBLISHED + "one,20.5,1.1,160,645,0,805,19.9,community,900,25.0,0.4\n")
    told = desk.refused("import", desk.board, "published.csv")
    for part in ("gpt-4-1106-preview", "gpt4_1106_preview", "its judge is a", "its protocol is preference", "--beside"):
        assert part in told
    for file, part in (
        ("older.csv", "compared with text_davinci_003"),
        ("bare.csv", "missing standard_error"),
        ("twice.csv", "'one' stands twice"),
        ("nowhere.csv", "found nothing there"),
        ("x=published.csv", "leave x= out"),
    ):
        assert part in desk.refused("import", desk.board, file, "--beside")
    said = desk("import", "published.csv", "--beside")
    assert "3 rows marked as published" in said
    table = pd.read_csv(desk.board / "leaderboard.csv")
    ours = table[table["imported"].isna()].set_index("name")
    pd.testing.assert_frame_equal(ours, own, check_dtype=False)
    theirs = table[table["imported"].notna()].set_index("name")
    assert set(theirs["imported"]) == {"published.csv"}
    assert list(theirs.index) == ["strong", "gpt4_1106_preview", "one (published)"]
    assert theirs.loc["strong", ["win_rate", "judge", "rank"]].tolist()[:2] == [60.5, "gpt-4-1106-preview"]
    assert theirs["rank"].isna().all() and (theirs["reference"] == "gpt4_1106_preview").all()
    page = assert_sound(desk.board / "report.html").words()
    assert "AlpacaEval 2" in page and "which nobody judged here" in page
    assert "bars are 95% intervals over prompts, from 20 to 70%" in page and "n/a to n/a" not in page
    assert page.index("too close to call" if "too close" in page else "wins") < page.index("Published figures")
    markdown = (desk.board / "leaderboard.md").read_text()
    assert "judged by gpt-4-1106-preview" in markdown and "| n/a | n/a | strong (published) | 60.5 | n/a |" in markdown
    desk("import", "published.csv", "--beside", "--model", "strong", "--replace")
    assert len(desk.table) == 3
    desk("remove", "published.csv")
    pd.testing.assert_frame_equal(desk.table, own)


@pytest.mark.slow
def test_recorded_models_are_added_one_by_one_to_alpaca_eval_and_its_published_rows(shared_data, tmp_path, desk):
    data = shared_data / "alpaca_eval"
    tool = shared_data.parent / "tools" / "replay_judge.py"
    published = pd.read_csv(data / "leaderboard.csv", index_col=0)
    models = ["alpaca-7b", "claude-2.1"]
    for n, model in enumerate(models):
        with replay(tool, data / model) as url:
            if not n:
                desk(
                    *("init", "--reference", data / "reference_gpt4_1106_preview.json.gz", "--judge-url", url),
                    *("--judge-model", "gpt-4-1106-preview", "--protocol", "alpaca_eval", "--calibration", data),
                )
            desk("add", data / model / "model_outputs.json.gz", "--judge-url", url)
    desk("import", data / "leaderboard.csv")
    table = pd.read_csv(desk.board / "leaderboard.csv")
    ours = table[table["imported"].isna()].set_index("name")
    for model in models:
        assert ours.loc[model, "win_rate"] == pytest.approx(published.loc[model, "win_rate"], abs=0.005)
        assert ours.loc[model, "n_total"] == published.loc[model, "n_total"]
        again = table.set_index("name").loc[f"{model} (published)"]
        assert again["win_rate"] == pytest.approx(ours.loc[model, "win_rate"], abs=0.005)
    assert len(table) == len(published) + 2
    words = assert_sound(desk.board / "report.html").words()
    assert "AlpacaEval 2" in words and f"{len(published)} rows marked as published" in words


def test_figures_that_cannot_be_read_are_said(tmp_path):
    (tmp_path / "deep.json").write_text("[" * 200_000)
    with pytest.raises(UserError, match=r"deep\.json is not JSON: maximum recursion depth"):
        read_results(tmp_path / "deep.json")
    with pytest.raises(UserError, match="found what cannot be read: Is a directory"):
        read_results(tmp_path)
