"""Jobs of the workflow survive kills and a full disk; `make torture` tries all of them."""

import signal

import pytest
from project import snakemake, wait_until
from torture import CONFIG, OVERLAY, STAGES, TORTURES, before, compare, finished_run, killed

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return finished_run(tmp_path_factory.mktemp("torture") / "finished")


@pytest.mark.parametrize(
    ("stage", "torture", "outcome"),
    [
        ("proposal_network", "TERM under way", "same result, resuming after epoch 1"),
        ("proposal_network", "reboot", "same result"),
        ("base_detector", "KILL under way", "same result, resuming after epoch 1"),
        ("base_detector", "KILL while writing", "same result, resuming after epoch 2"),
        ("base_detector", "disk full", "reported, then the same result"),
        ("retrieved_region_features", "KILL while writing", "same result"),
        ("retrieved_region_features", "disk full", "reported, then the same result"),
        ("retrieved_region_features", "reboot", "same result"),
        ("text_embeddings", "reboot", "same result"),
        ("pseudo_labels", "KILL under way", "same result"),
        ("region_embeddings", "KILL while writing", "same result"),
        ("region_embeddings", "disk full", "reported, then the same result"),
    ],
)
def test_the_same_command_finishes_with_the_same_result(finished, stage, torture, outcome):
    found = TORTURES[torture](STAGES[stage], finished)
    if found == "needs root":
        pytest.skip(found)
    assert found.startswith(outcome)


def test_a_second_run_in_the_same_folder_is_refused_and_disturbs_nothing(finished):
    with before(STAGES["region_embeddings"], finished) as job:
        process = job.start()
        wait_until(job.started, process)
        with pytest.raises(AssertionError, match="this folder is locked"):
            snakemake(job.folder, CONFIG, OVERLAY, *job.arguments())
        assert process.wait() == 0
        compare(job, finished)


def test_a_comment_does_not_cost_an_unfinished_training(finished):
    """The checkpoint carries the digest of the code's meaning, and comments have none."""
    with before(STAGES["base_detector"], finished) as job:
        assert killed(job, job.under_way, signal.SIGKILL)
        for module in ("training", "networks/detector", "stages/base_detector"):
            path = job.folder / "lpovod" / f"{module}.py"
            path.write_text("# A comment.\n\n" + path.read_text() + "\n\n# Another.\n")
        job.finish()
        assert "resuming after epoch 1" in job.path(f"logs/{job.stage.log}").read_text()
        compare(job, finished)
