"""The last lines on the screen after a failure, an interrupt and a lock."""

import os
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
from project import copy_project, start_snakemake, wait_until

from lpovod.epilogue import (
    AGAIN,
    FailedJob,
    error_of,
    failed_run,
    interrupted_run,
    missing_files,
    of_function,
    wrong_settings,
)

SMALL = {"train_images": 4, "val_images": 2, "tune_images": 2}
NEXT = f"Next: mend the cause, then {AGAIN}."
TEXTS = "results/smallest/text_embeddings/base.safetensors"


def test_a_message_of_several_lines_is_taken_from_the_log_once():
    log = "10:00:00 reading\n 50%|#####\rerror: two are wrong:\n  a\nerror: two are wrong:\n  a\n"
    assert error_of(log) == "error: two are wrong:\n  a"


def test_a_long_message_is_cut():
    error = error_of("error: many\n" + "".join(f"  {n}\n" for n in range(100)))
    assert error.splitlines()[-1] == "and 91 more lines"
    assert len(error.splitlines()) == 11


def test_of_a_traceback_the_last_line_is_shown():
    log = 'Traceback (most recent call last):\n  File "x", line 1\nValueError: no\n'
    assert error_of(log).startswith("ValueError: no (a defect")


def test_each_failed_stage_appears_once_with_its_error_and_its_log(tmp_path):
    logs = [tmp_path / f"{n}.log" for n in range(3)]
    logs[0].write_text("error: the first\n")
    logs[1].write_text("error: the second\n")
    logs[2].write_text("10:00 loading\n")
    jobs = [
        FailedJob("a", "Stage a of one", (logs[0],)),
        FailedJob("a", "Stage a of two", (logs[1],)),
        FailedJob("b", "Stage b", (logs[2],)),
    ]
    assert failed_run(jobs, ["some other error"]).splitlines() == [
        "The run failed.",
        "",
        "Stage a of one, and 1 more of this stage",
        "  error: the first",
        f"  log: {logs[0]}",
        "",
        "Stage b",
        "  error: it ended without a message: it was killed, perhaps for lack of memory",
        f"  log: {logs[2]}",
        "",
        "some other error",
        "",
        NEXT,
    ]


def test_after_an_interrupt_only_stages_with_an_error_count_as_failed(tmp_path):
    logs = [tmp_path / "ended.log", tmp_path / "failed.log"]
    logs[0].write_text("10:00 loading\n")
    logs[1].write_text("error: wrong\n")
    jobs = [FailedJob("a", "Stage a", (logs[0],)), FailedJob("b", "Stage b", (logs[1],))]
    assert interrupted_run(jobs[:1]) == f"Interrupted. To continue, {AGAIN}."
    assert "Stage b" in interrupted_run(jobs) and "Stage a" not in interrupted_run(jobs)


def test_the_place_in_our_code_is_left_out():
    message = (
        'WorkflowError in file "/a/b.smk", line 16:\nclip: no\n  file\n'
        '  File "/a/b.smk", line 16, in <module>\n  File "/a/b.smk", line 3, in f'
    )
    assert wrong_settings(message) == "error: clip: no\n  file"
    assert wrong_settings("MissingInput in file x") == "MissingInput in file x"


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    return copy_project(tmp_path_factory.mktemp("epilogue") / "project")


def printed(folder: Path) -> list[str]:
    return (folder / "printed").read_text().splitlines()


def run(folder: Path, overlay: dict, *arguments: str) -> tuple[int, list[str]]:
    process = start_snakemake(folder, "smallest.yaml", overlay, *arguments)
    return process.wait(300), printed(folder)


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--keep-going"]])
def test_a_failed_run_ends_with_error_log_and_next_step(project, more):
    np.save(project / "rows.npy", np.eye(3, 128, dtype=np.float32))
    (project / "names.json").write_text('["square", "disk"]')
    overlay = {"text_embeddings": {"file": "rows.npy", "classes": "names.json"}}
    arguments = ("--workflow-profile", "none", *more, "--cores", "2", TEXTS)
    code, lines = run(project, overlay, *arguments)
    assert code == 1
    named = [line for line in lines if " failed: " in line]
    assert len(named) == 1
    end = lines[lines.index("The run failed.") :]
    assert end[1:3] == ["", "Text embeddings of the classes"]
    assert end[3].startswith("  error: ") and "names.json" in end[3]
    assert end[4] == "  log: results/smallest/logs/text_embeddings.log"
    assert Path(project, end[4].removeprefix("  log: ")).is_file()
    assert end[5:] == ["", NEXT]
    noise = ("python -m", "CalledProcessError", "RuleException", "WorkflowError", "Traceback")
    assert [line for line in lines if any(word in line for word in noise)] == []
    # The file has what the screen lacks.
    whole = max((project / ".snakemake/log").glob("*.log"), key=os.path.getmtime).read_text()
    assert "python -m workflow_scripts.text_embeddings" in whole


@pytest.mark.slow
def test_a_lock_and_an_interrupt_end_with_the_next_step(project):
    overlay = {"dataset": {"miniature": SMALL}}
    log = project / "results/smallest/logs/text_embeddings.log"
    log.unlink(missing_ok=True)
    process = start_snakemake(project, "smallest.yaml", overlay, "--cores", "1", "-F", TEXTS)
    wait_until(log.exists, process)
    os.killpg(process.pid, signal.SIGSTOP)  # or it might end before the second has begun
    second = subprocess.run(
        ["snakemake", "--cores", "1", "--configfile", "configs/smallest.yaml", "overlay.yaml"],
        cwd=project,
        capture_output=True,
        text=True,
    )
    os.killpg(process.pid, signal.SIGINT)
    os.killpg(process.pid, signal.SIGCONT)
    assert process.wait(60) == 1
    assert not [line for line in printed(project) if line.startswith("Traceback")]
    assert printed(project)[-1] == f"Interrupted. To continue, {AGAIN}."
    assert second.returncode == 1
    end = second.stderr.splitlines()[-2:]
    assert end[0].startswith("error: this folder is locked")
    assert end[1].endswith(f"add --unlock to the command once, then {AGAIN}.")
    assert not list((project / ".snakemake/locks").glob("*"))


@pytest.mark.slow
def test_wrong_settings_end_with_the_keys(project):
    code, lines = run(project, {"pseudo_labels": {"kk": 3}, "seed": -1}, "-n")
    assert code == 1
    assert lines[-3:] == [
        "error: The configuration is wrong:",
        "  seed = -1: Input should be greater than or equal to 0",
        "  pseudo_labels.kk: unknown key; did you mean k?",
    ]


def test_a_missing_input_is_named_alone():
    text = "MissingInputException in rule x in file y, line 3:\nMissing input files for rule x:\n"
    text += "    output: o\n    affected files:\n        a.pkl\n        b.pkl"
    assert (
        missing_files(text)
        == "error: a.pkl, b.pkl: no such file, and no stage makes it. Correct its path"
    )


def test_an_error_of_an_input_function_is_shown_alone():
    text = "InputFunctionException in rule x in file y, line 3:\nError:\n  WorkflowError:\n"
    text += "    no file for val\nWildcards:\n  split=val\nTraceback:\n  File z, line 1, in f"
    assert of_function(text) == "error: no file for val"
    assert of_function("InputFunctionException: KeyError") == "InputFunctionException: KeyError"
