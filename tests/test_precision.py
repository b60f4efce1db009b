"""What is learned in bfloat16 detects as well as what is learned in float32."""

from pathlib import Path
from statistics import stdev

import pytest
from project import copy_project

from benchmarks.precision import measure

OVERLAY = Path("benchmarks/precision.yaml")
# AP50 with trainings in float32, seeds 0 to 3, by the command that the overlay names.
FLOAT32 = {
    "novel": (37.8, 29.1, 23.5, 36.3),
    "base": (59.0, 52.1, 50.2, 58.5),
    "all": (52.8, 45.3, 42.4, 52.0),
}


@pytest.mark.slow
def test_precision_changes_ap_by_less_than_the_seed_does(tmp_path):
    ap = measure(copy_project(tmp_path / "project"), 0, "bfloat16", OVERLAY)
    assert ap.keys() == FLOAT32.keys()
    for split, of_seeds in FLOAT32.items():
        assert ap[split] == pytest.approx(of_seeds[0], abs=stdev(of_seeds)), split
