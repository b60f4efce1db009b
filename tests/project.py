"""A copy of the project in which a test may run Snakemake and edit files."""

import os
import shutil
import subprocess
from pathlib import Path

import yaml

PARTS = ("Snakefile", "config.yaml", "configs", "envs", "lpovod", "profiles", "resources")
PARTS += ("rules", "workflow_scripts")


def copy_project(folder: Path) -> Path:
    folder.mkdir()
    for part in PARTS:
        (shutil.copytree if Path(part).is_dir() else shutil.copy2)(part, folder / part)
    return folder


def snakemake(folder: Path, config: str, overlay: dict, *arguments: str) -> str:
    """Run snakemake in a copy of the project; return what it printed.

    Args:
        folder: the copy.
        config: an overlay of the project, below configs/.
        overlay: laid over it.
        arguments: of snakemake.
    """
    overlay_file = folder / "overlay.yaml"
    overlay_file.write_text(yaml.safe_dump(overlay))
    done = subprocess.run(
        ["snakemake", "--configfile", f"configs/{config}", overlay_file.name, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"},
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return done.stdout + done.stderr
