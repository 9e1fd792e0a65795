"""Memory does not grow with a data set: what further rows cost the driver and a training worker."""

from __future__ import annotations

import pytest

from tests.benchmarks.rows import measure


@pytest.mark.slow
def test_further_rows_take_few_bytes(tmp_path):
    """Held as Python objects, rows of this length take 5,000 bytes on the driver and 2,000 on a worker."""
    few, many = ({side: f["anonymous"] for side, f in measure(n, shorter=20).items()} for n in (4_000, 24_000))
    assert (many["driver"] - few["driver"]) / 20_000 < 1_000
    assert (many["worker"] - few["worker"]) / 20_000 < 300
