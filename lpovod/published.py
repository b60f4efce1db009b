"""Digests of published files for which nobody publishes one: those of the first download.

They are kept in a json for version control, so that every later download, on any machine, must be
the same file::

    {"https://...": {"date": "2026-11-26", "sha256": "...", "size": 123}}

The workflow reads it while it builds its graph, so nothing heavy is imported.
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lpovod.artifacts import atomic, read_json, sha256
from lpovod.catalogue import FILES, Remote

RECORDS = Path("resources/published.json")


def expected(published: Remote, digest: str | None, records: Path = RECORDS) -> Remote:
    """A published file with the digest that it must have, if one is known.

    Args:
        published: of the catalogue.
        digest: of the configuration, which counts more than any other.
        records: of first downloads.
    """
    if digest:
        return Remote(published.url, digest)
    first = _read(records).get(published.url)
    if published.digest or not first:
        return published
    return Remote(published.url, first["sha256"], first["size"])


def remember(published: Remote, file: Path, records: Path = RECORDS) -> None:
    """Record a first download; of a file that is recorded, or in the catalogue, nothing changes."""
    records.parent.mkdir(parents=True, exist_ok=True)
    with _alone(records.parent):
        known = _read(records)
        if published.digest or published.url in known:
            return
        known[published.url] = {
            "size": file.stat().st_size,
            "sha256": sha256(file),
            "date": datetime.now(UTC).date().isoformat(),
        }
        with atomic(records) as partial:
            partial.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


def content_of(path: Path, records: Path = RECORDS) -> str:
    """What stands for the content of a file in the params of a rule: its digest, as a rule.

    A published file whose digest nobody knows before its download is its address, before and after
    it: otherwise what was made from it would be stale as soon as it is there.
    """
    published = FILES.get(path.name)
    if published is None:
        return sha256(path)
    if path.is_file():
        digest = sha256(path)
        if _read(records).get(published.url, {}).get("sha256") != digest:
            return digest
    return published.digest or published.url


def _read(records: Path) -> dict[str, Any]:
    return read_json(records) if records.is_file() else {}


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Waits for other downloads that write into the folder; the system ends it with the process."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
