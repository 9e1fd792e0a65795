"""The verb that looks after submitted jobs: jobs."""

from __future__ import annotations

from datetime import datetime
from functools import partial
from typing import Annotated, Any

import typer

from jobs.cli.terminal import one_of, show, stderr
from otpo.errors import UserError


def jobs(
    action: Annotated[str, typer.Argument(help="list, status, logs or stop")] = "list",
    job: Annotated[str | None, typer.Argument(help="a job's id, for all actions but list", show_default=False)] = None,
    address: Annotated[
        str,
        typer.Option("--address", envvar="RAY_API_SERVER_ADDRESS", help="the dashboard, e.g. http://127.0.0.1:8265"),
    ] = "",
    follow: Annotated[bool, typer.Option("--follow", help="with logs: until the job ends; exit with its code")] = False,
) -> None:
    """The jobs of a cluster: list, status, logs, stop."""
    from jobs.submit import connect, follow_job

    action = one_of("ACTION", action, "list", "status", "logs", "stop")
    client = connect(address)
    found = {each.submission_id: each for each in client.list_jobs() if each.submission_id}
    if action == "list":
        for each in sorted(found.values(), key=lambda each: each.start_time or 0):
            show(_line(each))
        if not found:
            show("No job has been submitted.")
        return
    if job not in found:
        known = ", ".join(found) or "none"
        raise UserError(f"otpo jobs {action}: expected the id of a job, found {job or 'nothing'}. There are: {known}.")
    if action == "status":
        show(_line(found[job]))
        if message := found[job].message:
            show(message)
    elif action == "stop":
        client.stop_job(job)
        show(f"{job} is being stopped. What it finished is kept, and submitting it again goes on from there.")
    elif follow:
        say = partial(stderr.print, markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(follow_job(client, job, say, partial(print, end="", flush=True)))
    else:
        print(client.get_job_logs(job), end="")


def _line(job: Any) -> str:
    """A job's id, state, exit code, times and folder."""
    code = "" if job.driver_exit_code is None else f"  exit code {job.driver_exit_code}"
    times = "  ".join(
        f"{word} {datetime.fromtimestamp(at / 1000):%Y-%m-%d %H:%M:%S}"
        for word, at in (("from", job.start_time), ("to", job.end_time))
        if at
    )
    where = (job.metadata or {}).get("results", "")
    return f"{job.submission_id}  {job.status}{code}  {times}" + (f"  results in {where}" if where else "")
