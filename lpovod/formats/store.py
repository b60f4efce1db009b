"""The store: what was made for one class or image, kept under a key of all that shaped it.

A stage that works on all classes at once takes from the store what it holds, makes the rest, and
adds it. Its declared outputs are complete without the store, so deleting the store, in whole or in
part and at any time, costs time and nothing else. A file appears under its name when it is whole,
and equal keys mean equal content, so several runs may share a store.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

from lpovod.artifacts import fingerprint, read_json, read_tensors, write_json, write_tensors
from lpovod.exceptions import LpovodError
from lpovod.progress import log

TRIES = 3  # to write a file that others may delete


def key_of(**shape: Any) -> str:
    """The key of what these values shape: 32 hexadecimal digits.

    Args:
        shape: by name, anything that json holds.
    """
    return fingerprint(shape)[:32]


class Store:
    """Files of one stage by key.

    Args:
        folder: of the files.
        stage: that makes them.
    """

    def __init__(self, folder: Path, stage: str):
        self.folder, self.stage, self._cleared = Path(folder), stage, False

    def json(self, key: str) -> Any:
        """The json under a key, or None."""
        content = self._read(self._json_path(key), read_json)
        whole = isinstance(content, dict) and content.keys() == {"key", "content"}
        return content["content"] if self._fits(content, whole and content["key"], key) else None

    def put_json(self, key: str, content: Any) -> None:
        """Keep json."""
        self._put(
            self._json_path(key), lambda path: write_json(path, {"key": key, "content": content})
        )

    def tensors(self, key: str) -> tuple[dict, dict] | None:
        """The arrays by name and the identity under a key, or None."""
        content = self._read(self.tensors_path(key), lambda path: read_tensors(path, self.stage))
        return content if self._fits(content, content and content[1].get("key"), key) else None

    def tensors_path(self, key: str) -> Path:
        """Path of the arrays under a key."""
        return self.folder / f"{key}.safetensors"

    def put_tensors(self, key: str, tensors: dict, ident: dict) -> None:
        """Keep arrays with their identity."""
        content = tensors, ident | {"key": key}
        self._put(self.tensors_path(key), lambda path: write_tensors(path, *content))

    def _json_path(self, key: str) -> Path:
        return self.folder / f"{key}.json"

    def _read(self, path: Path, read: Callable[[Path], Any]) -> Any:
        if not path.is_file():
            return None
        try:
            return read(path)
        except LpovodError as error:
            log.warning(f"made again: {error}")
            return None

    def _fits(self, content: Any, recorded: Any, key: str) -> bool:
        if content is not None and recorded != key:
            log.warning(f"made again: {self.folder / key} holds the content of another key")
        return content is not None and recorded == key

    def _put(self, path: Path, write: Callable[[Path], None]) -> None:
        if not self._cleared:  # killed runs leave hidden files
            for left in self.folder.glob(".*"):
                left.unlink(missing_ok=True)
            self._cleared = True
        for attempt in range(TRIES):
            # Another run may write the same key: each writes under a name of its own.
            unfinished = path.with_name(f".{uuid4().hex}{path.suffix}")
            try:
                write(unfinished)
                os.replace(unfinished, path)
                return
            except FileNotFoundError:  # deleted meanwhile, with the store or by another run
                if attempt == TRIES - 1:
                    raise
