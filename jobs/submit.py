"""`otpo submit`: the same run as a Ray job.

otpo submit small_world --address http://127.0.0.1:8265 --follow

`jobs.submission` says what is sent. The job's id is made of the recipe's name and content, so that the same recipe
submitted again is the same job.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shlex
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from jobs.command_submission import prepare_command
from jobs.submission import Job, prepare, size, stage
from otpo.errors import UserError, WorkError
from otpo.files import is_address
from pipeline.recipe import load_recipe
from pipeline.run.folder import RunFolder

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

LIMIT_MIB = 512  # the largest working directory that Ray's control store accepts
CONNECT_SECONDS = 10.0  # how long a cluster may take to respond at all
SILENT_SECONDS = 60.0  # how long a cluster may be silent while its job is followed

Say = Callable[[str], None]


def submit(
    source: str,
    overrides: list[str],
    *,
    address: str,
    runs: str | None,
    shared: list[Path],
    python: str | None,
    redo: bool,
    follow: bool,
    say: Say,
    show_log: Say,
    verb: str = "run",
) -> int:
    """Submit a recipe as a job, or find the job that it was submitted as before.

    A job that succeeded is submitted again with `redo`, and where its results are gone.

    Args:
        address: of the dashboard, http(s)://host:port.
        runs: folder of runs, on storage that every node sees, or its address on object storage; may be None where the
            cluster is this machine alone.
        shared: folders that every node sees under the same path: files in them are not sent.
        python: the interpreter on the cluster; by default this one where the cluster is this machine, else "python".
        follow: wait for the end and show the log.
        verb: what the job does (`jobs.submission.VERBS`).

    Returns:
        Exit code: 0, or that of the followed job.

    Raises:
        UserError: a wrong recipe, address or token, or too many local files; nothing was submitted.
        WorkError: the cluster went away while the job was followed.
    """
    recipe = load_recipe(source, overrides)
    client = connect(address)
    here = is_this_machine(client)
    if runs is None and not here:
        raise UserError(
            f"{address} is not this machine alone: say with --runs DIR where the runs go, an absolute path that every"
            " node sees (network storage)."
        )
    stored = runs is not None and is_address(runs)
    if runs is not None and not here and not stored and not Path(runs).is_absolute():
        raise UserError(f"--runs {runs}: on a cluster it must be an absolute path that every node sees.")
    submission = prepare(
        recipe,
        runs=runs if runs is not None and stored else str(Path(runs or "runs").absolute()),
        shared=[Path("/")] if here else [*shared, *([Path(runs)] if runs and not stored else [])],
        python=python or (sys.executable if here else "python"),
        redo=redo,
        verb=verb,
    )
    job = submission.job
    seen = not stored and (here or Path(submission.runs).is_dir())
    gone = seen and not has_results(Path(job.results), verb)
    words = ["otpo", "submit", source, *overrides, "--address", address, "--follow"]
    words += ["--verb", verb] if verb != "run" else []
    words += ["--runs", runs] if runs else []
    back = shlex.join(words + [word for folder in shared for word in ("--shared", str(folder))])
    return _submit(client, job, address, again=redo or gone, follow=follow, back=back, say=say, show_log=show_log)


def submit_command(
    verb: str,
    words: list[str],
    values: Mapping[str, Any],
    *,
    address: str,
    shared: list[Path],
    python: str | None,
    redo: bool,
    follow: bool,
    say: Say,
    show_log: Say,
) -> int:
    """Submit a command over files. The same command over the same files is one job, as long as its results are there.

    What a kept leaderboard is asked to do is done each time, but not twice at once.

    Args:
        verb, words, values: as `jobs.command_submission.prepare_command` takes them.
        redo: run it although it has succeeded.

    Returns and raises: as `submit`.
    """
    client = connect(address)
    here = is_this_machine(client)
    places = [Path("/")] if here else shared
    python = python or (sys.executable if here else "python")
    job = prepare_command(verb, words, values, shared=places, python=python, here=here)
    out = Path(job.results)
    gone = (here or out.parent.is_dir()) and not out.exists()
    outer, *inner = verb.split()
    options = ["--verb", outer, "--address", address, "--follow"]
    options += [word for folder in shared for word in ("--shared", str(folder))]
    back = shlex.join(["otpo", "submit", *options, "--", *inner, *words])
    again = redo or gone or outer == "board"
    return _submit(client, job, address, again=again, follow=follow, back=back, say=say, show_log=show_log)


def _submit(
    client: JobSubmissionClient,
    job: Job,
    address: str,
    *,
    again: bool,
    follow: bool,
    back: str,
    say: Say,
    show_log: Say,
) -> int:
    """Send a job that is not there yet, and follow it if asked. `back` is the command that comes back to it."""
    name, status = find(client, job.id, again=again)
    if status is None:
        _send(client, job, name, say)
    elif status == "SUCCEEDED":
        say(f"{name} has run already and succeeded; its results are in {job.results}.")
        return 0
    else:
        say(f"{name} is there already: {status}.")
    if not follow:
        say(f"Follow it with: {back}")
        return 0
    try:
        return follow_job(client, name, say, show_log)
    except KeyboardInterrupt:
        say(f"\nThe job goes on. Come back with: {back}\nStop it with: otpo jobs stop {name} --address {address}")
        return 1


def connect(address: str) -> JobSubmissionClient:
    """A client of the cluster's job server.

    Raises:
        UserError: nothing answers there, it is not a Ray dashboard, or the token is missing or wrong.
    """
    url = urlsplit(address)
    if url.scheme not in ("http", "https") or not url.hostname:
        raise UserError(
            f"--address {address}: expected the dashboard's address, such as http://127.0.0.1:8265 (`ray start --head`"
            " prints it)."
        )
    try:
        port = url.port or {"http": 80, "https": 443}[url.scheme]
        socket.create_connection((url.hostname, port), timeout=CONNECT_SECONDS).close()
    except (OSError, ValueError) as error:
        raise UserError(
            f"Nothing answers at {address} ({error}). Is the cluster up (`ray up cluster.yaml`, `ray start --head`),"
            " and the port forwarded (`ray dashboard cluster.yaml`, `kubectl port-forward`)?"
        ) from error
    os.environ["RAY_API_SERVER_ADDRESS"] = (
        address  # Ray lets RAY_ADDRESS override the argument, and this overrides both
    )
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.dashboard.modules").setLevel(logging.ERROR)
    try:
        client = JobSubmissionClient(address)
        client.list_jobs()
    except AuthenticationError as error:
        raise UserError(
            f"{address} wants a token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) to the token"
            f" that the cluster was started with. It said: {str(error).splitlines()[0]}"
        ) from error
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(f"{address} does not answer as a Ray dashboard: {str(error).splitlines()[0][:200]}") from error
    return client


def is_this_machine(client: JobSubmissionClient) -> bool:
    """Whether the cluster is this machine alone, so that paths and the interpreter are the same there.

    The address does not tell: a forwarded port of a distant cluster is on loopback too.
    """
    for _ in range(int(CONNECT_SECONDS)):
        found = client._do_request("GET", "/nodes?view=hostNameList", timeout=CONNECT_SECONDS)
        names = found.json().get("data", {}).get("hostNameList", []) if found.status_code == 200 else []
        if names:
            break
        time.sleep(1)  # a cluster that has just started does not list its own head yet
    return names == [socket.gethostname()]


def has_results(folder: Path, verb: str) -> bool:
    """Whether a run's folder holds what a verb makes last."""
    made = RunFolder(folder)
    if verb == "train":
        return any(made.models.glob("*/model"))
    if verb == "study":
        from pipeline.study.study import MARKDOWN

        return (folder / MARKDOWN).exists()
    return (made.sweep.best if verb == "sweep" else made.report).exists()


def find(client: JobSubmissionClient, name: str, *, again: bool = False) -> tuple[str, str | None]:
    """The newest attempt at a job that did not fail, and its status; else the id of the next attempt, and None.

    Args:
        again: whether an attempt that succeeded does not count either.
    """
    jobs = {job.submission_id: str(job.status) for job in client.list_jobs() if job.submission_id}
    ended = ("FAILED", "STOPPED", "SUCCEEDED") if again else ("FAILED", "STOPPED")
    attempt, job = 1, name
    while job in jobs:
        if jobs[job] not in ended:
            return job, jobs[job]
        attempt += 1
        job = f"{name}-attempt{attempt}"
    return job, None


def _send(client: JobSubmissionClient, job: Job, name: str, say: Say) -> None:
    sizes = {str(path): size(path) for path in job.inputs.values()}
    total = sum(sizes.values()) / 2**20
    if total > LIMIT_MIB:
        largest = sorted(sizes, key=sizes.__getitem__, reverse=True)[:3]
        raise UserError(
            f"The local files are {total:,.0f} MiB, and a job may carry {LIMIT_MIB} MiB. The largest: "
            + ", ".join(f"{file} ({sizes[file] / 2**20:,.0f} MiB)" for file in largest)
            + ". Put them on storage that every node sees and name it with --shared DIR, or use a hub name."
        )
    with tempfile.TemporaryDirectory(prefix="otpo-submit-") as staging:
        stage(job, Path(staging))
        say(f"Sending {size(Path(staging)) / 2**20:,.1f} MiB: code, recipe and {len(sizes)} inputs.")
        for path, count in sizes.items():
            say(f"  {count / 2**20:8,.1f} MiB  {path}")
        try:
            client.submit_job(
                entrypoint=job.entrypoint,
                submission_id=name,
                runtime_env={"working_dir": staging},
                metadata={"name": job.name, "results": job.results},
            )
        except RuntimeError as error:
            if find(client, job.id)[1] is None:
                raise WorkError(f"The cluster did not take the job: {str(error).strip().splitlines()[-1]}") from error
            say(f"{name} was submitted by another process at the same time.")
            return
    say(f"Submitted {name}: {job.entrypoint}")
    if job.judge_key:
        say(f"The judge's key does not travel: the job reads {job.judge_key} from the environment of the head node.")


def follow_job(client: JobSubmissionClient, job: str, say: Say, show_log: Say) -> int:
    """Show a job's log until the job ends. A lost connection is made again.

    Returns:
        0 if the job succeeded, else its command's exit code, or 1 where there is none.

    Raises:
        WorkError: the cluster was silent for `SILENT_SECONDS`.
    """
    import aiohttp
    import requests

    shown, heard = 0, time.monotonic()

    async def tail() -> None:
        nonlocal shown, heard
        position = 0  # a new connection sends the log from its start
        async for text in client.tail_job_logs(job):
            heard = time.monotonic()
            position += len(text)
            if position > shown:
                show_log(text[len(text) - (position - shown) :] if position - shown < len(text) else text)
                shown = position

    while True:
        try:
            status = client.get_job_status(job)
            heard = time.monotonic()
            if status != "PENDING":
                asyncio.run(tail())
            info = client.get_job_info(job)
            if info.status.is_terminal():
                break
        except (RuntimeError, OSError, aiohttp.ClientError, requests.RequestException, json.JSONDecodeError) as error:
            if time.monotonic() - heard > SILENT_SECONDS:
                raise WorkError(
                    f"The cluster has not answered for {SILENT_SECONDS:.0f} s ({error}). If it is gone, so is the job;"
                    " what it finished is kept, and submitting again goes on from there."
                ) from error
        time.sleep(1)
    say(f"{job}: {info.status}" + (f". {info.message}" if info.message and str(info.status) != "SUCCEEDED" else ""))
    return 0 if str(info.status) == "SUCCEEDED" else max(1, info.driver_exit_code or 1)
