"""A mistake of the user's ends a program with a message, never with a traceback."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lpovod.command_line import run
from lpovod.config import PseudoLabelsSettings


def stage(settings: PseudoLabelsSettings) -> int:
    """A program."""
    return settings.k


def failing(error: BaseException) -> int | str | None:
    """The exit code, or the message, of a program that raises."""

    def program() -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        run(program, arguments=[])
    return ended.value.code


def test_settings_are_json():
    assert run(stage, arguments=["--settings", '{"k": 7}']) == 7


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{k: 7}", ["not valid json", '{"k": 100}']),
        ('{"kk": 7}', ["kk: unknown key; did you mean k?"]),
        ('{"k": 0, "objectness": 2}', ["k = 0: ", "objectness = 2: "]),
        ("[1]", ["json = [1]: "]),
        ("pseudo_labels.json", ["not valid json"]),
    ],
)
def test_wrong_settings_are_explained(capsys, text, words):
    with pytest.raises(SystemExit) as ended:
        run(stage, arguments=["--settings", text])
    assert ended.value.code == 2
    printed = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert all(word in printed for word in words)
    assert "--settings" in printed and "pydantic" not in printed


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: folder.read_text(), "a file is expected there, not a folder"),
        (lambda folder: (folder / "a.json" / "b").read_text(), "a part of this path is a file"),
        (
            lambda folder: (folder / "c.json").read_text(),
            "No such file or directory: check the path",
        ),
        (lambda folder: (folder / ("x" * 300)).read_text(), "choose a shorter path"),
    ],
)
def test_a_wrong_path_is_an_error_that_names_it(tmp_path, make, words):
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(OSError) as caught:
        make(tmp_path)
    message = failing(caught.value)
    assert message.startswith(f"error: {tmp_path}") and words in message


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_path_that_may_not_be_written_is_named(number):
    message = failing(OSError(number, os.strerror(number), "/data/out.json"))
    assert message.startswith(f"error: /data/out.json: {os.strerror(number)}: ")


def test_an_error_of_the_system_that_names_no_file_keeps_its_traceback():
    with pytest.raises(ConnectionResetError):
        run(
            lambda: (_ for _ in ()).throw(ConnectionResetError(errno.ECONNRESET, "reset")),
            arguments=[],
        )


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_a_lack_of_memory_names_the_keys_to_change(error):
    message = failing(error)
    assert message.startswith("error: not enough memory")
    assert "images_per_step" in message and "region_embeddings.batch_size" in message
    assert "more" not in message.splitlines()[0].split()


def test_memory_that_torch_really_lacks_is_recognised():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert failing(caught.value).startswith("error: not enough memory")


def test_another_error_keeps_its_traceback():
    def program() -> None:
        raise RuntimeError("a defect")

    with pytest.raises(RuntimeError):
        run(program, arguments=[])


def test_a_closed_pipe_ends_silently():
    code = (
        "from lpovod.command_line import run\n"
        "def program() -> None:\n"
        "    for _ in range(100_000):\n"
        "        print('a line')\n"
        "run(program, arguments=[])\n"
    )
    command = f'{sys.executable} -c "$CODE" | head -1; echo ${{PIPESTATUS[0]}}'
    done = subprocess.run(
        ["bash", "-c", command], env=os.environ | {"CODE": code}, capture_output=True, text=True
    )
    assert done.stdout.split("\n")[:2] == ["a line", "141"]
    assert done.stderr == ""


def test_a_folder_in_place_of_a_json_has_no_traceback(tmp_path: Path):
    command = [sys.executable, "-m", "lpovod.apps.main", "score"]
    command += ["--ground-truth", str(tmp_path), "--detections", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr
