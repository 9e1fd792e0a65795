"""What a run tells Ray's metrics, read from the address from which Prometheus reads them."""

from __future__ import annotations

import re
import subprocess
import sys
import time
import urllib.request

import pytest

from pipeline.events.gauges import gauged, set_training


def test_without_a_cluster_the_callback_is_called_and_nothing_else():
    """In a process of its own: another test may have joined a cluster."""
    program = """
import sys
from pipeline.events.gauges import gauged, set_training
said = []
gauged(lambda *call: said.append(call), "mine")("judge", 3, 8, "x")
set_training("mine", "dpo", {"loss": 0.5})
assert said == [("judge", 3, 8, "x")] and "ray" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.slow
def test_prometheus_finds_how_far_the_work_is_and_how_fast_training_goes(ray_cluster):
    import ray

    gauged(lambda *_: None, "mine")("judge dpo", 3, 8, "")
    set_training("mine", "dpo", {"loss": 0.5, "step": 7, "tokens_per_second": 1234.0, "epoch": 1})
    (node,) = ray.nodes()
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    until, found = time.monotonic() + 90, {}
    while len(found) < 5 and time.monotonic() < until:
        time.sleep(1)
        try:
            text = urllib.request.urlopen(address, timeout=10).read().decode()
        except OSError:  # the agent is not up yet, or busy
            continue
        lines = re.findall(r'^ray_(otpo_\w+)\{([^}]*run="mine"[^}]*)\} (\S+)$', text, re.MULTILINE)
        found = {(name, re.search(r'work="([^"]*)"', tags)[1]): float(value) for name, tags, value in lines}
    assert found == {
        ("otpo_work_done", "judge dpo"): 3,
        ("otpo_work_total", "judge dpo"): 8,
        ("otpo_train_tokens_per_second", "dpo"): 1234,
        ("otpo_train_loss", "dpo"): 0.5,
        ("otpo_train_step", "dpo"): 7,
    }
