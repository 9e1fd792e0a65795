import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.html_page import assert_sound
from support.servers import completion

from eval.board import report
from eval.board.figures import COLOURS, INK, NEUTRAL, free_place, win_rate_against_length
from eval.board.leaderboard import leaderboard, write_leaderboard
from eval.board.run_files import Board, read_run, write_outputs
from eval.board.sentences import claim, explanation
from eval.board.standings import RANK_COLUMNS, pairs_of_models
from eval.board.verdicts.examples import examples
from eval.board.weights_page import DARKEST
from otpo.errors import UserError

HOSTILE = "</div><script>alert('x')</script><img src=https://evil.example/a.png onerror=alert(1)>"


def outputs_of(name: str, n: int, task: str, word: str) -> list[dict]:
    return [
        {"dataset": task, "instruction": f"Question {i} of {task}?", "output": f"{word} {i}. " * (i % 4 + 1)}
        | {"generator": name, "n_tokens": i % 4 + 3, "truncated": i == 0}
        for i in range(n)
    ]


def verdicts(
    outputs: dict[str, list[dict]], reference: list[dict], chance: dict[str, float], task: str
) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.05, len(reference))
    rows = [
        {
            **{"task": task, "generator": name, "reference": "base", "index": i, "instruction": row["instruction"]},
            **{"instruction_hash": str(i), "reference_hash": row["output"], "order": "reference_first"},
            "preference": 1 + float(np.clip(chance[name] + noise[i] + rng.normal(0, 0.05), 0, 1)),
            "error": None,
        }
        for name in outputs
        for i, row in enumerate(reference)
    ]
    return pd.DataFrame(rows)


def make_run(folder: Path, chance: dict[str, float], n: int = 40, task: str = "facts", hostile: bool = False) -> Path:
    outputs = {name: outputs_of(name, n, task, name) for name in chance}
    reference = outputs_of("base", n, task, "base")
    if hostile:
        first = next(iter(outputs))
        outputs[first][1]["output"] = HOSTILE
        reference[1]["output"] = HOSTILE + "{{ 7 * 7 }}"
    frame = verdicts(outputs, reference, chance, task)
    if hostile:
        frame.loc[3, ["preference", "error"]] = [np.nan, HOSTILE]
    board = leaderboard(frame, outputs, reference, judge="a-judge", protocol="preference")
    write_leaderboard(board, folder / "leaderboard.csv")
    (folder / "judge" / task).mkdir(parents=True, exist_ok=True)
    frame.to_parquet(folder / "judge" / task / "verdicts.parquet")
    write_outputs(folder, task, outputs, reference)
    return folder


def weight_rows() -> list[dict]:
    chosen, rejected = ["The", " capital", " is", " Paris", "."], ["It", " is", " <b>Lyon</b>", "\n"]
    common = {"prompt": "Which capital?", "chosen_tokens": chosen, "rejected_tokens": rejected}
    common |= {"uniform_chosen": 0.8, "uniform_rejected": 1.0, "metrics": {"weights/entropy": 0.75, "note": "text"}}
    weights = {"chosen_weights": [0.5, 0.5, 0.4, 2.2, 0.4], "rejected_weights": [0.5, 0.5, 2.5, 0.5]}
    return [{"label": label, "method": "otpo", **common, **weights} for label in ("otpo", "otpo-sharp")]


def add_training(folder: Path, labels: list[str]) -> None:
    for label in labels:
        (folder / "models" / label).mkdir(parents=True, exist_ok=True)
        lines = [
            {"step": s, "loss": 0.7 - s / 100, "rewards/accuracies": 0.5 + s / 100, "weights/entropy": 0.9}
            for s in range(1, 31)
        ] + [{"step": 30, "eval_loss": 0.5}]
        text = "\n".join(json.dumps(line) for line in lines)
        (folder / "models" / label / "metrics.jsonl").write_text(text + '\n{"step": 31, "lo')
    (folder / "weights.json").write_text(json.dumps(weight_rows()))
    cell = {"value": 0.7, "low": 0.6, "high": 0.8, "n": 90}
    world = {
        "note": "A controlled experiment, not evidence about large models.",
        "accuracy": {
            "base": {"trained": cell | {"value": 0.4}, "held_out": cell | {"value": 0.35}},
            **{label: {"trained": cell, "held_out": cell | {"value": 0.61}} for label in labels},
        },
        "words": {label: {"trained": 9.0, "held_out": 9.5} for label in ["base", *labels]},
        "deciding_token": [{"label": "otpo", "reg": 0.1, "auc": 0.93, "ratio": 4.1, "n": 90}],
    }
    (folder / "world.json").write_text(json.dumps(world))
    (folder / "recipe.yaml").write_text("name: <tiny>\n")
    manifest = {
        "versions": {"torch": "2.13.0"},
        "stages": {
            "train/otpo": {"inputs": "0123456789abcdef", "seconds": 12.5, "finished": "2026-01-02T03:04:05+00:00"}
        },
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_full_page_holds_every_part_and_nothing_hostile(tmp_path):
    run = make_run(tmp_path / "run", {"otpo": 0.8, "dpo": 0.6, "base": 0.5}, hostile=True)
    add_training(run, ["otpo", "dpo"])
    page = assert_sound(report.build([run], run))
    words = page.words()
    for section in ("Leaderboard", "Paired differences", "Known truth", "Training curves", "Token weights", "Examples"):
        assert section in words
    for name in ("otpo", "dpo", "base"):
        assert name in words
    sources = [path.read_text() for path in run.glob("*.html")]
    assert all(source.count("<script") <= 2 for source in sources)  # ours, of the hashes in the page's policy
    assert not any("alert" in source[: source.index("<title")] or "<img" in source for source in sources)
    assert not any("<script>alert" in source for source in sources)
    assert "alert('x')" in words  # the failed verdict's type: shown, not run
    assert "not evidence about large models" in words
    assert "61.0% of held-out questions right; the base model 35.0%" in words
    for made_by in ("train/otpo", "2026-01-02 03:04:05", "0123456789abcdef", "torch 2.13.0", "name: <tiny>"):
        assert made_by in words
    assert "1 of 120 verdicts failed" in words
    assert "line 32 of otpo/metrics.jsonl" in words
    verdict_page = assert_sound(run / "verdicts-facts-1.html").words()
    assert "alert('x')" in verdict_page and "{{ 7 * 7 }}" in verdict_page


def test_headline_says_who_won_by_how_much_how_sure_and_how_long(tmp_path):
    outputs = {name: outputs_of(name, 60, "t", name) for name in ("otpo", "dpo")}
    reference = outputs_of("base", 60, "t", "base")
    frame = verdicts(outputs, reference, {"otpo": 0.8, "dpo": 0.6}, "t")
    board = leaderboard(frame, outputs, reference, judge="j", protocol="p")
    pairs = pairs_of_models(frame, outputs)
    best = board.iloc[0]
    difference = f"{pairs.iloc[0]['difference']:.1f} points more than dpo"
    assert claim(board, pairs) == f"otpo wins {best['win_rate']:.1f}% against base, {difference}."
    text = " ".join(explanation(board, pairs))
    assert f"is {best['win_rate_low']:.1f} to {best['win_rate_high']:.1f}%, all of it above 50%" in text
    assert f"average {best['avg_length']} characters, as long as the reference's and" in text
    assert "zero is outside" in text


def test_headline_does_not_settle_what_the_numbers_leave_open():
    outputs = {name: outputs_of(name, 40, "t", name) for name in ("otpo", "dpo")}
    reference = outputs_of("base", 40, "t", "base")
    frame = verdicts(outputs, reference, {"otpo": 0.5, "dpo": 0.5}, "t")
    board = leaderboard(frame, outputs, reference, judge="j", protocol="p")
    assert "too close to call" in claim(board, pairs_of_models(frame))
    assert "their order is not settled" in " ".join(explanation(board, pairs_of_models(frame)))
    failed = frame.assign(preference=np.nan)
    board = leaderboard(failed, outputs, reference, judge="j", protocol="p")
    assert "No verdict came back" in claim(board, pairs_of_models(failed))
    assert "All 80 prompts are without a verdict" in explanation(board, pairs_of_models(failed))[0]


def test_a_board_without_any_verdict_still_makes_a_page(tmp_path):
    run = make_run(tmp_path / "run", {"otpo": 0.8})
    frame = pd.read_parquet(run / "judge" / "facts" / "verdicts.parquet").assign(preference=np.nan, error="timeout")
    frame.to_parquet(run / "judge" / "facts" / "verdicts.parquet")
    files = read_run(run)
    outputs, reference = files.outputs["facts"], files.references["facts"]
    write_leaderboard(leaderboard(frame, outputs, reference, judge="j", protocol="p"), run / "leaderboard.csv")
    words = assert_sound(report.build([run], run)).words()
    assert "No verdict came back" in words and "40 of 40 verdicts failed" in words


def test_models_that_were_judged_on_no_common_prompt_make_a_page(tmp_path):
    outputs = {name: outputs_of(name, 8, "t", name) for name in ("early", "late")}
    reference = outputs_of("base", 8, "t", "base")
    frame = verdicts(outputs, reference, {"early": 0.8, "late": 0.6}, "t")
    frame = frame[(frame["generator"] == "early") == (frame["index"] < 4)]
    board = leaderboard(frame, outputs, reference, judge="j", protocol="p")
    write_leaderboard(board, tmp_path / "leaderboard.csv")
    frame.to_parquet(tmp_path / "verdicts.parquet")
    words = assert_sound(report.build([tmp_path], tmp_path)).words()
    assert f"early wins {board.iloc[0]['win_rate']:.1f}% against base." in words and "no prompt in common" in words


def test_a_board_of_an_earlier_version_is_read(tmp_path):
    """Its table lacks the judge's bias and how verdicts were read; its verdicts lack the endpoint's words."""
    run = make_run(tmp_path / "run", {"otpo": 0.8, "dpo": 0.6})
    table = pd.read_csv(run / "leaderboard.csv")
    later = ["read", *(column for column in table if column.startswith(("first_share", "win_rate_shown")))]
    assert len(later) == 6
    later += [*RANK_COLUMNS, "win_rate_if_missing_lost", "win_rate_if_missing_won"]
    table.drop(columns=later).to_csv(run / "leaderboard.csv", index=False)
    frame = pd.read_parquet(run / "judge" / "facts" / "verdicts.parquet")
    frame.loc[3, ["preference", "error"]] = [np.nan, "timeout"]
    assert not {"read", "detail"} & set(frame)
    frame.to_parquet(run / "judge" / "facts" / "verdicts.parquet")
    words = assert_sound(report.build([run], run)).words()
    assert "otpo wins" in words and "1 of 80 verdicts failed" in words and "nan" not in words
    assert "All 2 models can be told apart" in words  # from its verdicts


def test_a_title_of_ones_own_stands_on_the_page(tmp_path):
    run = make_run(tmp_path / "run", {"otpo": 0.6})
    assert "Report on run" in assert_sound(report.build([run], run)).words()
    words = assert_sound(report.build([run], run, "Mine <b>")).words()
    assert "Mine <b>" in words and "Report on run" not in words


def test_parts_that_are_missing_are_left_out(tmp_path):
    trained = tmp_path / "trained"
    add_training(trained, ["otpo"])
    (trained / "weights.json").write_text("[{")
    words = assert_sound(report.build([trained], tmp_path / "a")).words()
    assert (
        "Training curves" in words and "Leaderboard" not in words and "weights.json of trained cannot be read" in words
    )

    judged = tmp_path / "judged"
    judged.mkdir()
    run = make_run(tmp_path / "run", {"otpo": 0.8, "dpo": 0.6}, n=5)
    (judged / "leaderboard.csv").write_bytes((run / "leaderboard.csv").read_bytes())
    (judged / "verdicts.parquet").write_bytes((run / "judge" / "facts" / "verdicts.parquet").read_bytes())
    words = assert_sound(report.build([judged], judged)).words()
    assert "Leaderboard" in words and "Examples" in words and "Question 4 of facts?" in words
    assert "Training curves" not in words and "Provenance" not in words and "Known truth" not in words

    (judged / "verdicts.parquet").unlink()
    assert "Paired" not in assert_sound(report.build([judged], judged)).words()


def test_odd_names_characters_and_files_do_no_harm(tmp_path):
    run, task = tmp_path / "run", "my/../task"
    outputs = {"org/model": outputs_of("org/model", 5, task, "caf\u00e9 \u6771\u4eac")}
    outputs["org/model"][2]["output"] = "half a pair: \ud83d"
    reference = outputs_of("base", 5, task, "base")
    frame = verdicts(outputs, reference, {"org/model": 0.9}, task)
    write_outputs(run, task, outputs, reference)
    frame.to_parquet(run / "verdicts.parquet")
    write_leaderboard(leaderboard(frame, outputs, reference, judge="j", protocol="p"), run / "leaderboard.csv")
    (run / "weights.json").write_text("{}")
    words = assert_sound(report.build([run], run)).words()
    assert "org/model wins" in words and "half a pair: ?" in words and "caf\u00e9 \u6771\u4eac 1." in words
    assert "weights.json of run: expected a list, found a dict" in words
    assert all(path.resolve().is_relative_to(run.resolve()) for path in tmp_path.rglob("*.json"))


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(UserError, match=r"notes\.txt"):
        report.build([tmp_path], tmp_path / "out")
    with pytest.raises(UserError, match="found none"):
        report.build([tmp_path / "nowhere"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_each_run_of_several_shows_its_own_truth(tmp_path):
    runs = [make_run(tmp_path / name, {"otpo": 0.8}) for name in ("one", "two")]
    for run, right in zip(runs, (0.35, 0.45), strict=True):
        add_training(run, ["otpo"])
        world = json.loads((run / "world.json").read_text())
        world["accuracy"]["base"]["held_out"]["value"] = right
        (run / "world.json").write_text(json.dumps(world))
    words = assert_sound(report.build(runs, tmp_path / "both")).words()
    assert "the base model 35.0%" in words and "the base model 45.0%" in words
    assert words.count("A controlled experiment, not evidence") == 2  # at the top, and beside the tables


def test_several_runs_make_one_board_with_names_that_tell_them_apart(tmp_path):
    first = make_run(tmp_path / "first", {"otpo": 0.8, "base": 0.5})
    second = make_run(tmp_path / "second", {"otpo": 0.6, "dpo": 0.55})
    other = make_run(tmp_path / "third", {"sampo": 0.6}, task="posts")
    page = assert_sound(report.build([first, second, other], tmp_path / "out"))
    board = pd.read_csv(tmp_path / "out" / "leaderboard.csv")
    assert set(board["name"]) == {"first/otpo", "base", "second/otpo", "dpo", "sampo"}
    assert dict(zip(board["name"], board["run"], strict=True))["second/otpo"] == "second"
    words = page.words()
    assert "first/otpo wins" in words and "points more than second/otpo" in words
    assert "Leaderboard of posts" in words


def test_every_prompt_stands_on_exactly_one_page(tmp_path):
    run = make_run(tmp_path / "run", {"otpo": 0.8, "dpo": 0.6}, n=230)
    words = assert_sound(report.build([run], run)).words()
    assert "30 of 230 prompts, drawn at random" in words
    pages = sorted(run.glob("verdicts-facts-*.html"))
    assert len(pages) == 3
    assert all(len(assert_sound(page).all("details")) == n for page, n in zip(pages, (100, 100, 30), strict=True))
    text = " ".join(page.read_text() for page in pages)
    assert all(text.count(f"Question {i} of facts?</div>") == 1 for i in range(230))


def test_a_models_page_has_its_verdicts_and_where_they_stand(tmp_path):
    run = make_run(tmp_path / "run", {"otpo": 0.55, "a/b": 0.4}, n=230)
    page = assert_sound(report.build([run], run))
    links = {attrs["href"] for attrs in page.all("a") if "model_pages" in (attrs.get("href") or "")}
    assert links == {f"model_pages/facts/{path.name}" for path in (run / "model_pages" / "facts").iterdir()}
    assert len(links) == 2
    own = assert_sound(run / "model_pages" / "facts" / "otpo.html")
    frame = read_run(run).verdicts["facts"]
    frame = frame[frame["generator"] == "otpo"]
    kinds = [set(attrs["data-kinds"].split(",")) for attrs in own.all("tr") if "data-kinds" in attrs]
    assert ["won" in kind for kind in kinds] == (frame["preference"] > 1.5).tolist()
    assert ["lost" in kind for kind in kinds] == (frame["preference"] < 1.5).tolist()
    # its outputs are "otpo i. ", as long as the reference's "base i. "
    assert not any({"longer and won", "shorter and lost"} & kind for kind in kinds)
    won = sum(frame["preference"] > 1.5)
    assert f"of 230 prompts {won} won, {230 - won} lost, 0 tied" in own.words()
    places = [attrs["href"] for attrs in own.all("a") if ".html#" in (attrs.get("href") or "")]
    assert len(set(places)) == 230 and places[120] == "../../verdicts-facts-2.html#facts-121"
    text = (run / "verdicts-facts-2.html").read_text()
    assert "Question 120 of facts?" in text[text.index('id="facts-121"') : text.index('id="facts-122"')]


def test_orders_that_disagree_long_wins_and_the_judges_words_can_be_found(tmp_path):
    run = make_run(tmp_path / "run", {"otpo": 0.8}, n=12)
    path = run / "judge" / "facts" / "verdicts.parquet"
    frame = pd.read_parquet(path).assign(raw=json.dumps(completion("m", {"m": 0.9, "M": 0.1})))
    frame.loc[2, "raw"] = json.dumps(completion("<think>Hm.</think>The first is <b>wrong</b>, so M.", None))
    frame.loc[4, "raw"] = json.dumps(completion('{"better": "m"}', None))
    swapped = frame.assign(order="model_first")
    swapped.loc[3, "preference"] = 1.0
    pd.concat([frame, swapped], ignore_index=True).to_parquet(path)
    outputs = run / "models" / "otpo" / "facts" / "model_outputs.json"
    rows = json.loads(outputs.read_text())
    rows[5]["output"] += " and longer than any of the reference's outputs can be, which is a reason to look at it"
    outputs.write_text(json.dumps(rows))
    report.build([run], run)
    own = assert_sound(run / "model_pages" / "facts" / "otpo.html")
    kinds = [attrs["data-kinds"].split(",") for attrs in own.all("tr") if "data-kinds" in attrs]
    assert [i for i, kind in enumerate(kinds) if "orders disagree" in kind] == [3]
    assert [i for i, kind in enumerate(kinds) if "longer and won" in kind] == [5]
    assert own.words().count("The first is <b>wrong</b>, so M.") == 2 and " m " not in own.words()
    assert (run / "report.html").read_text().count("The first is &lt;b&gt;wrong&lt;/b&gt;, so M.") == 2


def test_examples_pair_outputs_with_their_own_prompt(tmp_path):
    run = read_run(make_run(tmp_path / "run", {"otpo": 0.8, "dpo": 0.2}, n=12))
    outputs = {name: list(reversed(rows)) for name, rows in run.outputs["facts"].items()}
    board = Board("facts", "j", "p", "base", run.board, run.verdicts["facts"], outputs, run.references["facts"])
    for item in examples(board):
        assert [output.outcome for output in item.outputs] == ["wins", "loses"]
        i = item.instruction.split()[1]
        assert all(f"{output.name} {i}. " in output.text for output in item.outputs)
        assert f"base {i}. " in item.reference


def test_hostile_names_are_text_in_every_table_and_attribute(tmp_path):
    names = {HOSTILE: 0.8, '" onmouseover="alert(2)': 0.6, "a|b\n`c`": 0.4}
    run = make_run(tmp_path / "run", names, hostile=True)
    page = assert_sound(report.build([run], run))
    assert not page.all("img") and len(page.all("script")) == 2
    titles = {attrs.get("title") for attrs in page.all("abbr")}
    assert titles == set(names)
    assert {attrs["data-sort"] for attrs in page.all("th") if "data-sort" in attrs} == set(names)
    lines = (run / "leaderboard.md").read_text().splitlines()
    assert not any("<" in line for line in lines) and sum(line.startswith("| ") for line in lines) == 5
    assert any("a\\|b \\`c\\`" in line for line in lines)


def test_a_long_name_breaks_after_its_separators_and_reads_as_it_is(tmp_path):
    name = "my_team/llama-3.1_otpo.v2"
    run = make_run(tmp_path / "run", {name: 0.8, "a_<b>": 0.4}, n=12)
    page = assert_sound(report.build([run], run))
    assert "my_<wbr>team/<wbr>llama-3.1_<wbr>otpo.<wbr>v2" in (run / "report.html").read_text()
    assert {attrs["data-sort"] for attrs in page.all("th") if "data-sort" in attrs} == {name, "a_<b>"}
    assert name in page.words() and "a_<b>" in page.words()


def test_a_board_of_many_models_names_the_first_and_pictures_all(tmp_path):
    names = {f"m{i:02d}": 0.3 + i / 60 for i in range(18)}
    run = make_run(tmp_path / "run", names, n=12)
    page = assert_sound(report.build([run], run))
    (picture,) = page.all("img")
    assert picture["src"].startswith("data:image/png") and "All 18 models against each other" in picture["alt"]
    assert len(page.all("abbr")) == 14 and "the first 14 of 18 models" in page.words()
    assert "Each of the 18 models against the next one and against the best" in page.words()


def test_the_page_names_the_models_that_no_shorter_one_beats(tmp_path):
    run = make_run(tmp_path / "run", {"good": 0.8, "long": 0.7, "short": 0.5, "twin": 0.4}, n=12)
    board = pd.read_csv(run / "leaderboard.csv")
    figures = {"good": (60.0, 200.0), "long": (50.0, 300.0), "short": (40.0, 100.0), "twin": (40.0, 100.0)}
    board[["win_rate", "avg_length"]] = [figures[name] for name in board["name"]]
    board.to_csv(run / "leaderboard.csv", index=False)
    page = assert_sound(report.build([run], run))
    assert "no other beats with outputs as short or shorter: short, twin, good." in page.words()


boxes = st.lists(st.tuples(st.floats(0, 500), st.floats(0, 300)), min_size=1, max_size=14)


@given(boxes)
@settings(max_examples=60, deadline=None)
def test_labels_cover_nothing(points):
    taken = [(x - 8, y - 8, x + 8, y + 8) for x, y in points]
    marks = len(taken)
    for x, y in points:
        if box := free_place(taken, (0, 0, 600, 320), x, y, 70, 15):
            taken.append(box)
    for i, a in enumerate(taken):
        for b in taken[max(i + 1, marks) :]:
            assert not (a[0] < b[2] and a[2] > b[0] and a[1] < b[3] and a[3] > b[1])


def test_scatter_names_every_model_in_text_and_for_a_screen_reader(tmp_path):
    run = read_run(make_run(tmp_path / "run", {"otpo": 0.8, "dpo": 0.6, "$a_b$": 0.4}))
    looks = report.styles(["otpo", "dpo", "$a_b$"])
    picture = win_rate_against_length(run.board, looks)
    label = picture[: picture.index(">")]
    for name in run.board["name"]:
        assert name in label
    assert ">otpo<" in picture.replace("\n", "") and "<script" not in picture and "<metadata" not in picture


def luminance(colour: tuple[float, ...]) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def rgb(code: str) -> tuple[float, ...]:
    return tuple(int(code[i : i + 2], 16) / 255 for i in (1, 3, 5))


def test_text_has_the_contrast_of_wcag_aa():
    for colour in (*COLOURS, NEUTRAL, INK):
        assert 1.05 / (luminance(rgb(colour)) + 0.05) >= 4.5, colour
    darkest = tuple(1 - DARKEST * (1 - c) for c in (11 / 255, 98 / 255, 164 / 255))
    assert (luminance(darkest) + 0.05) / (luminance(rgb(INK)) + 0.05) >= 4.5
