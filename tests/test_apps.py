"""The console command: help that a newcomer understands, one style of errors, exit codes."""

import json
import re
import signal
import subprocess
import sys

import pytest
import yaml

from lpovod.apps.main import COMMANDS
from lpovod.config import Config, documentation

IMPORTING_TORCH = {"search", "detect", "learn", "serve"}


def lpovod(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "lpovod.apps.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_help_lists_every_command():
    done = lpovod("--help")
    assert done.returncode == 0 and done.stderr == ""
    for name, (_, line) in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(line)}$", done.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    "command",
    [pytest.param(n, marks=pytest.mark.slow) if n in IMPORTING_TORCH else n for n in COMMANDS],
)
def test_every_command_explains_its_options(command):
    done = lpovod(command, "--help")
    assert done.returncode == 0, done.stderr
    assert f"usage: lpovod {command}" in done.stdout
    options = re.findall(r"--[a-z-]+", done.stdout)
    assert len(set(options)) > 1


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "usage: lpovod COMMAND"),
        (("serch",), 2, "there is no command 'serch'; did you mean search?"),
        pytest.param(("search",), 2, "error: name something to search for", marks=pytest.mark.slow),
        (("score", "--ground-truth", "gt.json"), 2, "--detections"),
        (("config", "--print", "nothing"), 2, "--print"),
        (("score", "--ground-truth", "gt.json", "--detections", "dt.json"), 1, "gt.json: no such"),
        (("config", "nowhere.yaml"), 1, "error: nowhere.yaml: no such file"),
        pytest.param(
            ("search", "star", "--results", "nowhere"),
            1,
            "error: nowhere/region_index/train.index",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_wrong_usage_ends_with_2_and_wrong_data_with_1(arguments, code, message):
    done = lpovod(*arguments)
    assert done.returncode == code
    assert message in done.stderr and "Traceback" not in done.stderr


def test_a_wrong_key_is_named(tmp_path):
    (tmp_path / "mine.yaml").write_text("pseudo_labels: {kk: 3}")
    done = lpovod("config", "config.yaml", str(tmp_path / "mine.yaml"))
    assert done.returncode == 1
    assert "pseudo_labels.kk: unknown key; did you mean k?" in done.stderr


def test_the_configuration_is_printed_with_all_defaults(tmp_path):
    (tmp_path / "mine.yaml").write_text("pseudo_labels: {k: 7}")
    done = lpovod("config", "config.yaml", str(tmp_path / "mine.yaml"))
    values = yaml.safe_load(done.stdout)
    assert values["pseudo_labels"]["k"] == 7
    assert values["region_embeddings"]["scales"] == [1.0, 1.5]
    assert Config.model_validate(values).pseudo_labels.k == 7


def test_documentation_and_schema_are_printed():
    assert lpovod("config", "--print", "documentation").stdout == documentation()
    schema = json.loads(lpovod("config", "--print", "schema").stdout)
    with open("config/schemas/config.schema.yaml") as committed:
        assert schema == yaml.safe_load(committed)
    assert "pseudo_labels" in schema["properties"]


def test_a_stage_s_log_has_times_and_levels(tmp_path):
    code = (
        "from lpovod.command_line import run; from lpovod.progress import log\n"
        "def work(): log.info('begun'); log.warning('odd')\n"
        "run(work, arguments=[])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    first, second = done.stderr.splitlines()
    assert re.fullmatch(r"\d\d:\d\d:\d\d begun", first)
    assert re.fullmatch(r"\d\d:\d\d:\d\d WARNING: odd", second)


def test_a_stage_s_help_names_the_command_and_has_an_example_of_its_settings():
    command = [sys.executable, "-m", "workflow_scripts.region_index", "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.startswith("usage: python -m workflow_scripts.region_index ")
    assert """such as '{"factory": "SQfp16"}'""" in done.stdout


def test_a_reader_that_has_ended_is_no_error():
    command = [sys.executable, "-m", "lpovod.apps.main", "config", "config.yaml"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as program:
        program.stdout.close()
        assert program.stderr.read() == b""
    assert program.returncode == 128 + signal.SIGPIPE
