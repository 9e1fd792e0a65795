"""Joining a Ray cluster, or starting one on this machine."""

from __future__ import annotations

import logging
from typing import Any

import ray

from otpo.errors import UserError, WorkError
from pipeline.cluster.address import LOCAL, check_answers, find_address


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
    for name in ("ray", "ray.data", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.ERROR)
    found = joined.address_info
    dashboard = f"its dashboard is at http://{found['webui_url']}, " if found.get("webui_url") else ""
    return f"{dashboard}its logs on this node are in {found['session_dir']}/logs"


def _words(error: Exception) -> str:
    """Ray's message in one line: the versions of a mismatch stand in its later lines."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 500 else f"{text[:500]}..."
