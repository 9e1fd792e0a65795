"""Where a Ray cluster is, and whether it answers. Ray itself waits many minutes for an address where nothing does."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from urllib.parse import urlsplit

from ray._private import services  # Ray has no public way to read "auto" without connecting

from otpo.errors import UserError

REACH_SECONDS = 8.0  # for a connection to the port
ANSWER_SECONDS = 20.0  # for the control store behind it to answer
LOCAL = "local"
ASK = """
import sys
from ray._raylet import GcsClient
from ray.exceptions import AuthenticationError
try:
    GcsClient(address=sys.argv[1]).internal_kv_keys(b"", b"otpo")
except AuthenticationError:
    pass  # a cluster that wants a token has answered
"""


@dataclass(frozen=True)
class Address:
    """A cluster's address.

    Attributes:
        value: as `ray.init` takes it; "local" for a cluster that starts and ends with this process.
        source: where it came from, in words.
    """

    value: str
    source: str


def find_address(given: str | None) -> Address:
    """The address to connect to: the one that is given, else that of RAY_ADDRESS, else "local".

    Args:
        given: `cluster.address` of a recipe. "auto" is the cluster that was started last on this machine.

    Raises:
        UserError: it is "auto" and no cluster was started on this machine.
    """
    value, source = given, "cluster.address"
    if not value:
        value, source = os.environ.get("RAY_ADDRESS", "").strip(), "the environment variable RAY_ADDRESS"
    if not value or value == LOCAL:
        return Address(LOCAL, "")
    if value == "auto":
        try:
            found = services.canonicalize_bootstrap_address("auto")
        except (ConnectionError, ValueError, OSError):
            found = None
        if not found:
            raise UserError(
                f"{source} is 'auto', but no Ray cluster runs on this machine. Start one with `ray start --head`, or"
                f" {_without(source)}."
            )
        return Address(found, f"the cluster last started on this machine ({source} is 'auto')")
    return Address(value, source)


def check_answers(address: Address) -> None:
    """Whether a cluster answers, within about `REACH_SECONDS + ANSWER_SECONDS`.

    Raises:
        UserError: the address cannot be read, nothing listens there, or what listens is no cluster that answers.
    """
    if address.value == LOCAL:
        return
    try:
        parts = urlsplit(address.value if "//" in address.value else f"//{address.value}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or not port or parts.scheme not in ("", "ray"):
        raise UserError(
            f"expected a Ray address HOST:PORT (6379 unless it was chosen) or ray://HOST:10001, found '{address.value}'"
            f" from {address.source}. The dashboard's http:// address is for `otpo submit --address`."
        )
    try:
        socket.create_connection((host, port), timeout=REACH_SECONDS).close()
    except OSError as error:
        raise _silent(address, str(error) or type(error).__name__) from error
    if parts.scheme == "ray":
        return  # Ray's client has a limit of its own
    try:
        subprocess.run(
            [sys.executable, "-c", ASK, f"{host}:{port}"], check=True, capture_output=True, timeout=ANSWER_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise _silent(address, f"something listens, but it gave no answer in {ANSWER_SECONDS:.0f} s") from error
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").strip().splitlines()
        raise _silent(address, lines[-1] if lines else "it gave no answer") from error


def _silent(address: Address, reason: str) -> UserError:
    return UserError(
        f"No Ray cluster answers at '{address.value}', the address from {address.source}: {reason}. Start one there"
        f" (`ray start --head`), mend the address, or {_without(address.source)}."
    )


def _without(source: str) -> str:
    """How to run on this machine alone."""
    where = "leave cluster.address out" if source == "cluster.address" else "unset RAY_ADDRESS"
    return f"{where} to run on this machine alone"
