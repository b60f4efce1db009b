"""A world that is learned in bfloat16 is found as well as one that is learned in float32."""

from pathlib import Path

import pytest
from project import copy_project

from benchmarks.precision import measure

# AP50 in float32 with seeds 0, 1, 2, 3, measured by the command that the overlay names.
FLOAT32 = {
    "novel": (37.8, 29.1, 0, 0),
    "base": (59.0, 52.1, 0, 0),
    "all": (52.8, 45.3, 0, 0),
}


@pytest.mark.slow
def test_bfloat16_reaches_the_precision_of_float32_within_the_spread_of_seeds(tmp_path):
    folder = copy_project(tmp_path / "project")
    ap = measure(folder, 0, "bfloat16", Path("benchmarks/precision.yaml"))
    assert ap.keys() == FLOAT32.keys()
    for split, of_seeds in FLOAT32.items():
        assert min(of_seeds) <= ap[split] <= max(of_seeds), split
