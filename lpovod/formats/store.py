"""The store: what was made for one class or image, kept under a key of all that shaped it.

A stage that works on all classes at once takes from the store what it holds, makes the rest, and
adds it. Its declared outputs are complete without the store, so deleting the store, in whole or in
part and at any time, costs time and nothing else. A file appears under its name when it is whole,
and equal keys mean equal content, so several runs may share a store.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from lpovod.artifacts import read_json, read_tensors, write_json, write_tensors
from lpovod.exceptions import LpovodError
from lpovod.progress import log


def key_of(**shape: Any) -> str:
    """The key of what these values shape: 32 hexadecimal digits.

    Args:
        shape: by name, anything that json holds.
    """
    return hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()[:32]


class Store:
    """Files of one stage by key.

    Args:
        folder: of the files.
        stage: that makes them.
    """

    def __init__(self, folder: Path, stage: str):
        self.folder, self.stage = Path(folder), stage

    def json(self, key: str) -> Any:
        """The json under a key, or None."""
        path = self.folder / f"{key}.json"
        content = self._read(path, read_json)
        return content["content"] if content and content.get("key") == key else None

    def put_json(self, key: str, content: Any) -> None:
        """Keep json."""
        write_json(self.folder / f"{key}.json", {"key": key, "content": content})

    def tensors(self, key: str) -> tuple[dict, dict] | None:
        """The arrays by name and the identity under a key, or None."""
        content = self._read(self.tensors_path(key), lambda p: read_tensors(p, self.stage))
        return content if content and content[1].get("key") == key else None

    def tensors_path(self, key: str) -> Path:
        """Path of the arrays under a key."""
        return self.folder / f"{key}.safetensors"

    def put_tensors(self, key: str, tensors: dict, ident: dict) -> None:
        """Keep arrays with their identity."""
        write_tensors(self.tensors_path(key), tensors, ident | {"key": key})

    def _read(self, path: Path, read: Any) -> Any:
        if not path.is_file():
            return None
        try:
            return read(path)
        except LpovodError as error:
            log.warning(f"made again: {error}")
            return None
