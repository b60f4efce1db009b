"""`lpovod config`: check a configuration, print it, or describe every key."""

import json
from pathlib import Path
from typing import Annotated, Literal

import tyro
import yaml

from lpovod.config import Config, documentation, read_config
from lpovod.progress import log
from lpovod.sources import check_classes, read_sources


def config(
    files: Annotated[tuple[Path, ...], tyro.conf.Positional] = (Path("config.yaml"),),
    print_: Annotated[
        Literal["values", "documentation", "schema"], tyro.conf.arg(name="print")
    ] = "values",
) -> None:
    """Check a configuration and print it with all defaults, as the stages receive it.

    Args:
        files: config.yaml and the overlays on top of it, in order.
        print_: "values": every key with its value, as yaml; "documentation": every key with its
            default and meaning, as markdown; "schema": a json schema, for editors.
    """
    if print_ == "documentation":
        print(documentation(), end="")
    elif print_ == "schema":
        print(json.dumps(Config.model_json_schema(), indent=2))
    else:
        settings = read_config(files)
        for warning in check_classes(settings, read_sources(settings)):
            log.warning(warning)
        values = settings.model_dump(mode="json")
        print(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), end="")
