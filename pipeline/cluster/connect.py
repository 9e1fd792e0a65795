"""Joining a Ray cluster, or starting one on this machine."""

from __future__ import annotations

import logging
import os

import ray

from otpo.errors import UserError, WorkError


def connect(address: str | None = None) -> None:
    """Join the cluster at `address` (or RAY_ADDRESS), else start one on this machine that ends with this process.

    Does nothing when this process is connected already.

    Raises:
        UserError: no cluster responds at the address. WorkError: Ray did not start in time.
    """
    if ray.is_initialized():
        return
    # worker output goes to Ray's own log files; what matters comes back as metrics and errors
    try:
        ray.init(
            address=address or os.environ.get("RAY_ADDRESS") or "local",
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except ConnectionError as error:
        raise UserError(
            f"No Ray cluster answers at '{address}': {error}. Start one with `ray start --head`, or leave"
            " cluster.address out."
        ) from error
    except Exception as error:  # Ray raises no narrower one when a node is too slow to start
        if "timed out" not in str(error):
            raise
        raise WorkError(
            f"Ray did not start in time: {error}. Is the machine very busy? The same command tries again."
        ) from error
    for name in ("ray", "ray.data", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.ERROR)
