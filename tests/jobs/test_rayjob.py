"""`python -m jobs.rayjob` on a real cluster: wrong input ends the Ray job as STOPPED, any other failure as FAILED.

The job is submitted and followed by the commands of KubeRay's submitter (`BuildJobSubmitCommand` in its job.go).
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.pools import ROOT
from test_submit import Head, head  # noqa: F401  (the cluster with token authentication)


def run_job(head: Head, name: str, *entrypoint: str) -> tuple[str, str]:  # noqa: F811
    """(how it ended, log) of a job on the cluster."""

    def ray(*words: str) -> str:
        command = [str(Path(sys.executable).parent / "ray"), "job", *words[:1], "--address", head.address, *words[1:]]
        done = subprocess.run(command, env=head.env, capture_output=True, text=True, timeout=240)
        # were following the log to fail, KubeRay would try the job again
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    environment = json.dumps({"env_vars": {"PYTHONPATH": str(ROOT)}})
    ray("submit", "--submission-id", name, "--runtime-env-json", environment, "--no-wait", "--", *entrypoint)
    log = ray("logs", "--follow", name)
    status = ray("status", name)
    return next(word for word in ("was stopped", "failed", "succeeded") if f"Job '{name}' {word}" in status), log


@pytest.mark.slow
def test_wrong_input_stops_the_job(head: Head) -> None:  # noqa: F811
    ended, log = run_job(head, "wrong", sys.executable, "-m", "jobs.rayjob", "run", "/nowhere/recipe.yaml")
    assert ended == "was stopped", log
    assert "/nowhere/recipe.yaml" in log and "Wrong input: the job is stopped" in log


@pytest.mark.slow
def test_a_failure_while_working_fails_the_job(head: Head) -> None:  # noqa: F811
    program = "import sys, jobs.rayjob as job; job.otpo = lambda: sys.exit(1); job.main()"
    ended, log = run_job(head, "failing", sys.executable, "-c", program)
    assert ended == "failed" and "Wrong input" not in log


def test_outside_of_a_job_the_exit_code_says_it() -> None:
    command = [sys.executable, "-m", "jobs.rayjob", "run", "/nowhere/recipe.yaml"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 2 and "error:" in done.stderr and "Wrong input" not in done.stdout
