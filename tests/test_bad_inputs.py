"""What users get wrong, one line each: the essential words of the message, and when it comes.

Findings about images and annotations have a table of their own in `test_check`.
"""

import copy
import json
import pickle
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from conftest import TINY_CLIP, make_clip, make_world, write_proposals, write_shards
from PIL import Image
from project import copy_project
from safetensors.torch import save_file

from lpovod.apps.main import main
from lpovod.artifacts import identity, read_json, sha256, write_json, write_tensors
from lpovod.clip import load_clip
from lpovod.command_line import run
from lpovod.config import (
    BackboneSettings,
    BaseDetectorSettings,
    ClipSettings,
    LinearProbeSettings,
    ProposalsSettings,
    PseudoLabelsSettings,
    RegionEmbeddingsSettings,
    RegionIndexSettings,
    TextEmbeddingsSettings,
    load_config,
    read_config,
)
from lpovod.formats.index import open_index
from lpovod.formats.regions import open_shards, read_proposals
from lpovod.importers.backbone import start_from
from lpovod.importers.checkpoints import import_base_detector, import_linear_probe
from lpovod.importers.proposals import import_proposals
from lpovod.importers.pseudo_labels import import_pseudo_labels
from lpovod.networks.proposal_network import ProposalNetwork
from lpovod.sources import check_classes, read_sources
from lpovod.stages.evaluation import evaluate
from lpovod.stages.linear_probe import train_linear_probe
from lpovod.stages.pseudo_labels import retrieve
from lpovod.stages.region_embeddings import embed_regions
from lpovod.stages.region_index import build_region_index
from lpovod.stages.text_embeddings import embed_classes

DEFAULT = yaml.safe_load(Path("config.yaml").read_text())
COUNTS = {7: 4, 3: 9, 900: 0, 41: 1, 20: 6}
HTML = b"<!DOCTYPE html><html><title>404: not found</title></html>"
NO_BLOCK, NO_LIST = "a block of keys", "valid list"


class Evil:
    """Writes a file if a reader runs the code of a pickle."""

    def __reduce__(self):
        return Path("ran").touch, ()


class Case(NamedTuple):
    """A mistake.

    Attributes:
        when: it is noticed: config, check (of the data), stage or command.
        mistake: what the user did.
        act: does it, in a folder of its own.
        words: essential words of the message.
        code: exit code, 2 for wrong usage.
    """

    when: str
    mistake: str
    act: Callable[[], object]
    words: tuple[str, ...]
    code: int = 1


# How a mistake is made.


def keys(**values: Any) -> Callable[[], object]:
    """The default configuration with other values; two underscores lead into a block."""
    content = copy.deepcopy(DEFAULT)
    for path, value in values.items():
        *blocks, last = path.split("__")
        place = content
        for block in blocks:
            place = place.setdefault(block, {})
        place[last] = value
    return lambda: load_config(content)


def overlay(text: str | bytes) -> Callable[[], object]:
    """An overlay of that text."""

    def act() -> object:
        Path("mine.yaml").write_bytes(text.encode() if isinstance(text, str) else text)
        return read_config([Path("config.yaml"), Path("mine.yaml")])

    return act


def command(*words: str, **files: Any) -> Callable[[], object]:
    """A command line of lpovod; names of files have two underscores in place of the dot."""

    def act() -> None:
        for name, content in files.items():
            text = content if isinstance(content, str) else json.dumps(content)
            Path(name.replace("__", ".")).write_text(text)
        sys.argv[:] = ["lpovod", *words]
        main()

    return act


def stage(name: str, *words: str) -> Callable[[], object]:
    """A command line of a stage."""

    def act() -> None:
        sys.argv[:] = [f"workflow_scripts/{name}.py", *words]
        runpy.run_module(f"workflow_scripts.{name}", run_name="__main__")

    return act
