"""The page on kept leaderboards works as it is printed, its workflow for GitHub Pages included."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
import yaml
from support.docs.printed import ROOT, blocks, follow
from support.servers import ScriptedJudge

PAGE, WORKFLOW = "board.md", ".github/workflows/leaderboard.yml"
PUBLISHED = """,win_rate,standard_error,n_wins,n_wins_base,n_draws,n_total,discrete_win_rate,mode,avg_length,\
length_controlled_winrate,lc_standard_error
gpt4_1106_preview,50.0,0.0,0,0,805,805,50.0,minimal,2049,50.0,
"""


@pytest.fixture
def judge() -> Iterator[ScriptedJudge]:
    with ScriptedJudge() as server:
        yield server


@pytest.fixture
def env(judge: ScriptedJudge) -> dict[str, str]:
    return os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "JUDGE_URL": judge.url,
        "JUDGE_MODEL": "test",
        "OTHER_JUDGE": "test-2",
        "OPENAI_API_KEY": "not-used",
    }


def write_outputs(file: Path, name: str) -> None:
    rows = [{"instruction": f"{n}?", "output": f"{name} {n}", "generator": name} for n in range(8)]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(rows))


@pytest.mark.slow
def test_the_page_works_as_printed(tmp_path, env):
    for name in ("reference", "base", "tuned", "later"):
        write_outputs(tmp_path / f"{name}.json", name)
    for name in ("base", "tuned"):
        figures = {"model_name": f"org/{name}", "results": {"arc_easy": {"acc,none": 0.5}}, "n-shot": {"arc_easy": 0}}
        (tmp_path / f"results_{name}.json").write_text(json.dumps(figures))
    (tmp_path / "alpaca_eval_leaderboard.csv").write_text(PUBLISHED)
    said = follow(PAGE, tmp_path, env)
    assert len(said) == 4
    board = pd.read_csv(tmp_path / "board" / "leaderboard.csv").set_index("name")
    assert list(board.index.sort_values()) == ["base", "gpt4_1106_preview", "tuned", "tuned, 2 epochs"]
    assert board["judge"].value_counts().to_dict() == {"test-2": 3, "gpt-4-1106-preview": 1}
    assert board.loc["tuned", "lm_eval: arc_easy acc, 0-shot"] == 0.5


@pytest.mark.slow
def test_the_workflow_is_one_and_its_steps_do_what_the_page_says(tmp_path, env, judge):
    (text,) = (block.text for block in blocks(PAGE) if block.file == WORKFLOW)
    workflow = yaml.safe_load(text)
    assert set(workflow) == {True, "permissions", "concurrency", "jobs"}  # YAML 1.1 reads `on` as true
    assert workflow[True]["push"]["paths"] == ["outputs/**"] and workflow[True]["schedule"][0]["cron"].count(" ") == 4
    assert workflow["permissions"] == {"contents": "write", "pages": "write", "id-token": "write"}
    (job,) = workflow["jobs"].values()
    assert job["environment"]["url"] == "${{ steps.pages.outputs.page_url }}"
    used = [step["uses"].split("@")[0] for step in job["steps"] if "uses" in step]
    assert used == [f"actions/{name}" for name in ("checkout", "setup-python", "upload-pages-artifact", "deploy-pages")]
    steps = {step["name"]: step for step in job["steps"] if "run" in step}
    assert list(steps) == ["Install", "Judge", "Commit", "Pages"]
    assert steps["Judge"]["env"] == {"OPENAI_API_KEY": "${{ secrets.OPENAI_API_KEY }}"}

    def run(command: str, folder: Path) -> str:
        done = subprocess.run(["bash", "-euc", command], cwd=folder, env=env, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def push() -> None:
        for name in ("Judge", "Commit", "Pages"):
            run(steps[name]["run"], tmp_path / "work")

    run("git init --quiet --bare remote && git clone --quiet remote work", tmp_path)
    work = tmp_path / "work"
    for name in ("one", "two"):
        write_outputs(work / "outputs" / f"{name}.json", name)
    write_outputs(work / "reference.json", "reference")
    priced = "--budget-usd 20 --price-input 1 --price-output 1"
    run(f"otpo board init board --reference reference.json --judge-url $JUDGE_URL --judge-model test {priced}", work)
    run("git config user.name me && git config user.email me@example.org && git add . && git commit -qm start", work)
    run("git push --quiet --set-upstream origin HEAD", work)
    push()
    site = {str(path.relative_to(work / "site")) for path in (work / "site").rglob("*") if path.is_file()}
    assert {"index.html", "report.html", "leaderboard.csv", "leaderboard.json", "leaderboard.md"} <= site
    assert {f"model_pages/alpaca_eval/{name}.html" for name in ("one", "two")} <= site
    assert not [name for name in site if "sqlite" in name or "parquet" in name]
    calls = len(judge.calls)
    run("rm -r site", work)
    push()  # nothing is new
    assert len(judge.calls) == calls and run("git log --format=%s", work).splitlines() == ["Judge what is new", "start"]
    run("git clone --quiet remote other && cp -r work/outputs/one.json other/outputs/three.json", tmp_path)
    write_outputs(tmp_path / "other" / "outputs" / "three.json", "three")
    run(steps["Judge"]["run"], tmp_path / "other")  # a fresh checkout knows what was paid for
    assert len(judge.calls) == calls + 8
    assert set(pd.read_csv(tmp_path / "other" / "board" / "leaderboard.csv")["name"]) == {"one", "two", "three"}
