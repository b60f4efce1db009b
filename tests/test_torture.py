"""Jobs of the workflow survive kills and a full disk; `make torture` tries all of them."""

import pytest
from torture import STAGES, TORTURES, finished_run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return finished_run(tmp_path_factory.mktemp("torture") / "finished")


@pytest.mark.parametrize(
    ("stage", "torture", "outcome"),
    [
        ("proposal_network", "TERM under way", "same result, going on after epoch 1"),
        ("proposal_network", "reboot", "same result"),
        ("base_detector", "KILL under way", "same result, going on after epoch 1"),
        ("base_detector", "KILL while writing", "same result, going on after epoch 2"),
        ("base_detector", "disk full", "told, then the same result"),
        ("region_embeddings", "KILL while writing", "same result"),
        ("region_embeddings", "disk full", "told, then the same result"),
    ],
)
def test_the_same_command_finishes_with_the_same_result(finished, stage, torture, outcome):
    found = TORTURES[torture](STAGES[stage], finished)
    if found == "needs root":
        pytest.skip(found)
    assert found.startswith(outcome)
