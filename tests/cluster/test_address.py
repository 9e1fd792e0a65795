"""An address where no cluster answers is told in words, soon, and with the place that it came from."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.command import free_port, otpo, refused
from support.training import settings

from otpo.errors import UserError
from pipeline.cluster import address
from pipeline.cluster.address import Address, check_answers, find_address


@contextmanager
def listener() -> Iterator[str]:
    """A port that takes connections and never says anything, as a stopped head does."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize(
    ("given", "environment", "found", "source"),
    [
        (None, None, "local", ""),
        (None, "", "local", ""),
        (None, "local", "local", ""),
        ("local", "10.0.0.1:6379", "local", ""),
        (None, "10.0.0.1:6379", "10.0.0.1:6379", "RAY_ADDRESS"),
        ("10.0.0.2:6379", "10.0.0.1:6379", "10.0.0.2:6379", "cluster.address"),
    ],
)
def test_a_recipes_address_counts_before_the_environments(monkeypatch, given, environment, found, source):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if environment is not None:
        monkeypatch.setenv("RAY_ADDRESS", environment)
    address = find_address(given)
    assert address.value == found
    assert address.source.endswith(source)


@pytest.mark.parametrize("value", ["http://127.0.0.1:8265", "127.0.0.1", "ray://127.0.0.1", "127.0.0.1:port", ":6379"])
def test_what_is_no_address_is_refused_with_the_form_expected(value):
    with pytest.raises(UserError, match="HOST:PORT") as caught:
        check_answers(Address(value, "cluster.address"))
    assert value in str(caught.value)


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "localhost:{}", "ray://127.0.0.1:{}"])
def test_a_port_where_nothing_listens(form):
    value = form.format(free_port())
    with pytest.raises(UserError, match="No Ray cluster answers") as caught:
        check_answers(Address(value, "the environment variable RAY_ADDRESS"))
    assert value in str(caught.value)
    assert "refused" in str(caught.value)
    assert "unset RAY_ADDRESS" in str(caught.value)


def test_a_name_that_no_machine_has():
    with pytest.raises(UserError, match=r"leave cluster\.address out"):
        check_answers(Address("no-such-host.invalid:6379", "cluster.address"))


def test_a_port_that_takes_connections_and_says_nothing(monkeypatch):
    monkeypatch.setattr(address, "ANSWER_SECONDS", 3.0)
    with listener() as value, pytest.raises(UserError, match="something listens, but it gave no answer"):
        check_answers(Address(value, "cluster.address"))


@pytest.mark.slow
def test_a_cluster_that_answers_is_told_from_one_that_is_stopped():
    """The same head, once running and once stopped (SIGSTOP)."""
    port = free_port()
    ray = Path(sys.executable).with_name("ray")
    start = [ray, "start", "--head", f"--port={port}", "--num-cpus=1", f"--dashboard-port={free_port()}", "--block"]
    with tempfile.TemporaryDirectory() as short:  # a socket's path has 107 bytes at most
        environment = os.environ | {"RAY_TMPDIR": short, "RAY_AUTH_MODE": "disabled"}
        with subprocess.Popen(start, env=environment, stdout=subprocess.PIPE, start_new_session=True) as head:
            try:
                assert head.stdout is not None
                assert any(b"Ray runtime started" in line for line in head.stdout)
                given = Address(f"127.0.0.1:{port}", "cluster.address")
                check_answers(given)
                stores = subprocess.check_output(["pgrep", "-f", f"gcs_server.*--gcs_server_port={port}"], text=True)
                for process in stores.split():
                    os.kill(int(process), signal.SIGSTOP)
                with pytest.raises(UserError, match="it gave no answer in 20 s"):
                    check_answers(given)
            finally:
                os.killpg(head.pid, signal.SIGKILL)


@pytest.mark.parametrize("by", ["recipe", "environment"])
def test_the_command_ends_with_exit_code_2_before_anything_starts(tmp_path, tiny_llama, by):
    value = f"127.0.0.1:{free_port()}"
    tree = settings(tmp_path, tiny_llama, methods={"dpo": {}})
    if by == "recipe":
        tree["cluster"] = {"address": value}
    (tmp_path / "recipe.yaml").write_text(json.dumps(tree))
    environment = {"RAY_ADDRESS": value} if by == "environment" else {}
    refused(otpo(tmp_path, "train", "recipe.yaml", **environment), value, "refused")
