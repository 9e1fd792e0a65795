"""The entrypoint of jobs/rayjob.yaml: `python -m jobs.rayjob run RECIPE` is `otpo run RECIPE` as a KubeRay RayJob.

KubeRay gives every failed job a new cluster until `backoffLimit` is used up, whatever its exit code. A wrong recipe
(exit code 2) would be as wrong on the next cluster. The one end besides success that KubeRay does not try again is a
stopped job, so wrong input stops the job: its status is STOPPED, and its log ends with the error.

Source: `Reconcile` and `checkBackoffLimitAndUpdateStatusIfNeeded` in KubeRay's rayjob_controller.go, 1.6.0 to 1.7.0.
"""

from __future__ import annotations

import json
import os
import time

from jobs.cli import main as otpo

WRONG_INPUT = 2
STOP_SECONDS = 60.0  # how long Ray may take to end this process once it was asked to


def main() -> None:
    """Run `otpo` with the words after the module's name; stop the Ray job where it refuses them."""
    try:
        otpo()
    except SystemExit as exit:
        if exit.code == WRONG_INPUT:
            stop_this_job()
        raise


def stop_this_job() -> None:
    """Ask Ray to stop the job that this process is; returns only where it is none."""
    config = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    job = config.get("metadata", {}).get("job_submission_id")
    if job is None:
        return
    from ray.job_submission import JobSubmissionClient

    print("Wrong input: the job is stopped, so that KubeRay does not try it again.", flush=True)
    JobSubmissionClient().stop_job(job)
    time.sleep(STOP_SECONDS)  # Ray ends this process; ending by itself would make the job FAILED


if __name__ == "__main__":
    main()
