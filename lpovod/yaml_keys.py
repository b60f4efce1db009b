"""Keys that a yaml file has twice: yaml itself keeps the last and silently drops the first."""

from collections.abc import Iterable
from pathlib import Path

import yaml

from lpovod.exceptions import LpovodError


def check_repeated(paths: Iterable[Path]) -> None:
    """Refuse yaml files in which a block has a key twice.

    Files that are missing or no yaml are left to their reader.

    Raises:
        LpovodError: naming file, line and key of all of them.
    """
    repeated = [line for path in paths for line in _repeated(path)]
    if repeated:
        raise LpovodError("\n  ".join(["a key is given twice; unite the two:", *repeated]))


def _repeated(path: Path) -> list[str]:
    try:
        root = yaml.compose(path.read_text(), yaml.SafeLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return []
    lines, waiting = [], [root]
    while waiting:
        node = waiting.pop()
        if isinstance(node, yaml.MappingNode):
            names = [key.value for key, _ in node.value]
            for number, (key, value) in enumerate(node.value):
                waiting.append(value)
                if key.value in names[:number]:
                    lines.append(f"{path}, line {key.start_mark.line + 1}: {key.value}")
        elif isinstance(node, yaml.SequenceNode):
            waiting += node.value
    return lines
