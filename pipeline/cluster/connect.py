"""Joining a Ray cluster, or starting one on this machine."""

from __future__ import annotations

import logging
import os
from typing import Any

import ray
from ray._private import worker

from otpo.errors import UserError, WorkError
from pipeline.cluster.address import LOCAL, check_answers, find_address
from pipeline.cluster.native_words import native_words_to, terminal
from pipeline.cluster.sudden_end import speak_for

HEAD_ENVIRONMENT = "RAY_gcs_rpc_server_reconnect_timeout_s"
HEAD_SECONDS = 60  # Ray's own value
LOCAL_ENVIRONMENT = {
    HEAD_ENVIRONMENT: "20",  # seconds; a head on this machine is not started again by anybody
    # Ray would take 15, with which every process of its own goes first: the threads of a step on a small machine wait
    # for each other, and so for a dozen of these
    "RAY_worker_niceness": "0",
}


def head_seconds() -> int:
    """How long Ray waits for a head that does not answer before it ends this process; in the environment as
    `HEAD_ENVIRONMENT`, which Ray's native code reads.
    """
    text = os.environ.get(HEAD_ENVIRONMENT, "")
    return int(text) if text.isdecimal() else HEAD_SECONDS


def connect(given: str | None = None) -> str | None:
    """Join the cluster at an address, else start one on this machine that ends with this process.

    Does nothing when this process is connected already. An address where no cluster answers is told within half a
    minute.

    Args:
        given: `cluster.address` of a recipe; without one, RAY_ADDRESS counts.

    Returns:
        Where to look at the cluster, as a sentence; None when this process was connected already.

    Raises:
        UserError: no cluster answers at the address, or one of another version.
        WorkError: Ray did not start on this machine.
    """
    if ray.is_initialized():
        return None
    address = find_address(given)
    check_answers(address)
    if address.value == LOCAL:
        for name, value in LOCAL_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
    # worker output goes to Ray's own log files; what matters comes back as metrics and errors
    try:
        joined: Any = ray.init(address=address.value, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # Ray has no one type for what can go wrong here
        if address.value != LOCAL:
            raise UserError(
                f"The Ray cluster at '{address.value}', the address from {address.source}, cannot be joined:"
                f" {_words(error)}"
            ) from error
        raise WorkError(
            f"Ray did not start on this machine: {_words(error)} Is the machine very busy, or its disk or memory"
            " full? The same command tries again."
        ) from error
    for name in ("ray", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.ERROR)
    worker._worker_logs_enabled = False  # Ray has no setting for it: else a dying raylet's log comes to the terminal
    found = joined.address_info
    logs = f"{found['session_dir']}/logs"
    speak_for(os.getpid(), logs, terminal())
    native_words_to(f"{logs}/otpo-{os.getpid()}.err")
    dashboard = f"its dashboard is at http://{found['webui_url']}, " if found.get("webui_url") else ""
    return f"{dashboard}its logs on this node are in {logs}"


def _words(error: Exception) -> str:
    """Ray's message in one line: the versions of a mismatch stand in its later lines."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 500 else f"{text[:500]}..."
