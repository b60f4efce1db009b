"""Stage `download`: fetch public files, resume after an interruption, and verify them.

A download resumes where it was cut off, unless the server's file has changed since, by its ETag or
date: bytes of two versions are never joined. A file gets its final name once it is complete and
verified. Files that already exist are used.

COCO publishes no digests: `lpovod.catalogue` has the SHA-1 that GluonCV's download script records,
and sizes from other public code; neither was checked against the server. OpenAI's address of a CLIP
model contains the file's SHA-256. Where nobody publishes a digest, that of the first download
counts (`lpovod.published`).
"""

import hashlib
import http.client
import json
import shutil
import stat
import time
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from lpovod.artifacts import write_json
from lpovod.catalogue import COCO, COCO_CONTENT, DRIVE, FILES, Remote
from lpovod.exceptions import DISK_FULL, LpovodError, disk_full
from lpovod.progress import log, progress
from lpovod.published import expected, remember

BLOCK = 1 << 20
TRIES = 6  # in a row that bring no new byte
LONGEST_PAUSE = 60.0  # seconds
TEMPORARY = {408, 429, 500, 502, 503, 504}
STARTS = (b"PK\x03\x04", b"\x80")
"""First bytes of zip archives and of pickles. Files without a known digest are one or the other."""


def download_coco(archive: str, root: Path, record: Path, digest: str | None = None) -> None:
    """Download and extract one of COCO's archives, unless its content exists.

    Args:
        archive: name of the archive, a key of `COCO`.
        root: folder to extract to; existing content is used in place. The archive itself is removed
            after the extraction.
        record: output, json, written when the content is complete.
        digest: SHA-1 or SHA-256 that the archive must have; None for the catalogue's.
    """
    unfinished = root / f".{archive}.unfinished"
    present = all((root / path).exists() for path in COCO_CONTENT[archive])
    if present and not unfinished.exists():
        log.info(f"{root} already has {', '.join(COCO_CONTENT[archive])}")
    else:
        root.mkdir(parents=True, exist_ok=True)
        unfinished.touch()
        download(expected(COCO[archive], digest), root / archive)
        extract(root / archive, root)
        (root / archive).unlink()
        unfinished.unlink()
    write_json(record, {"content": COCO_CONTENT[archive], "url": COCO[archive].url})


def download_file(output: Path, records: Path, digest: str | None = None) -> None:
    """Download a published file.

    Args:
        output: where to put it; its name selects it, a key of `FILES`.
        records: json of first downloads, with which this one must agree, or which it extends.
        digest: SHA-1 or SHA-256 that it must have; None for the catalogue's or the recorded one.
    """
    download(expected(FILES[output.name], digest, records), output)
    remember(FILES[output.name], output, records)


def extract_member(archive: Path, output: Path) -> None:
    """Extract one file of a zip archive, from whichever of its folders.

    Args:
        archive: the archive.
        output: where to put the file, which has the same name in the archive.

    Raises:
        LpovodError: if the archive is damaged, has not exactly one file of the name, or a link.
    """
    with _opened(archive, output) as file:
        members = [m for m in file.infolist() if PurePosixPath(m.filename).name == output.name]
        if len(members) != 1:
            raise LpovodError(
                f"{archive} has {len(members)} files named {output.name}, expected one. Is it the "
                f"published archive? Put the file by hand at {output.resolve()}, or remove the "
                "archive, and rerun the command"
            )
        _check_member(archive, members[0])
        _write_member(file, members[0], output)


def download(remote: Remote, path: Path, pause: float = 1.0) -> None:
    """Download a file, or only verify it if it exists.

    Args:
        remote: address, size and digest; without a digest any archive or pickle is accepted.
        path: where to put the file; an unfinished download lies beside it.
        pause: seconds before the second attempt; every further pause is twice as long.

    Raises:
        LpovodError: naming the address, the problem and the manual remedy: if the server cannot be
            reached or refuses, the disk is full, or the file is not the published one.
    """
    if path.exists():
        _check(remote, path, path)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, version = (path.with_name(f".{path.name}.{end}") for end in ("partial", "version"))
    try:
        _receive_whole(remote, path, partial, version, pause)
    except LpovodError:
        if not _size(partial):
            partial.unlink(missing_ok=True)
        raise
    try:
        _check(remote, partial, path)
    except LpovodError:
        partial.unlink()
        raise
    finally:
        version.unlink(missing_ok=True)
    partial.replace(path)


def _receive_whole(remote: Remote, path: Path, partial: Path, version: Path, pause: float) -> None:
    """Receive the file, in as many attempts as it takes and `TRIES` allows."""
    failures = 0
    while True:
        before = _size(partial)
        try:
            if remote.url.startswith(DRIVE):
                _receive_from_drive(remote, path, partial)
            else:
                _receive(remote, path, partial, version)
            return
        except urllib.error.HTTPError as error:
            reason = f"the server answers {error.code} {error.reason}"
            if error.code not in TEMPORARY:
                raise _unreachable(remote, path, reason) from None
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, OSError) and error.errno in DISK_FULL:
                raise disk_full(partial, error.errno) from None
            reason = str(getattr(error, "reason", error)) or type(error).__name__
        failures = 1 if _size(partial) > before else failures + 1
        if failures == TRIES:
            raise _unreachable(remote, path, reason)
        wait = min(LONGEST_PAUSE, pause * 2 ** (failures - 1))
        log.info(f"{remote.url}: {reason}; next attempt in {wait:.0f} s")
        time.sleep(wait)


def _receive(remote: Remote, path: Path, partial: Path, version: Path) -> None:
    """Append the missing bytes to `partial`, or start it again if the server's file has changed."""
    request = urllib.request.Request(remote.url)
    known = json.loads(version.read_text()) if version.exists() else None
    received = _size(partial) if known else 0
    if known and received:
        request.add_header("Range", f"bytes={received}-")
        request.add_header("If-Range", known)
    try:
        response = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        # Nothing is left to send, or the file is shorter now; the digest will show which.
        if error.headers.get("Content-Range") != f"bytes */{received}":
            partial.unlink()
            raise ConnectionError("the file has changed; starting again") from None
        return
    with response:
        stated = _version(response)
        if received and (response.status != 206 or stated != known):
            if response.status == 206:
                partial.unlink()
                raise ConnectionError("the file has changed; starting again")
            log.info(f"{remote.url} has changed or cannot be resumed: starting again")
            received = 0
        if received and not response.headers["Content-Range"].startswith(f"bytes {received}-"):
            partial.unlink()
            raise ConnectionError("the server sent a different range than requested")
        rest = int(response.headers.get("Content-Length", 0))
        _check_room(path, rest)
        # Without a version, nothing shows whether the remaining bytes belong to the same file.
        version.unlink(missing_ok=True)
        with open(partial, "ab" if received else "wb") as file:
            if stated:
                version.write_text(json.dumps(stated))
            _copy(response, file, path.name, received, rest)
    if rest and _size(partial) < received + rest:
        raise ConnectionError(f"the connection broke off after {_size(partial)} bytes")


def _copy(
    response: http.client.HTTPResponse, file: BinaryIO, name: str, received: int, rest: int
) -> None:
    total = received + rest if rest else None
    with progress(None, name, "B", total, initial=received, unit_scale=True) as bar:
        while block := response.read(BLOCK):
            file.write(block)
            bar.update(len(block))


def _receive_from_drive(remote: Remote, path: Path, partial: Path) -> None:
    """Write `partial` with gdown, from its start."""
    import gdown
    from gdown.exceptions import DownloadError, FileURLRetrievalError

    with open(partial, "wb") as file, progress(None, path.name, "B", unit_scale=True) as bar:

        def received(so_far: int, total: int | None) -> None:
            if not bar.n:
                _check_room(path, (total or so_far) - so_far)
            bar.update(so_far - bar.n)

        try:
            gdown.download(
                remote.url, file, quiet=True, use_cookies=False, timeout=60, progress=received
            )
        except FileURLRetrievalError as error:  # a page without a link: a login, a quota
            reason = " ".join(str(error).split()).rstrip(".")
            raise _unreachable(remote, path, reason) from None
        except DownloadError as error:
            raise ConnectionError(str(error)) from None


def _check_room(path: Path, rest: int) -> None:
    if shutil.disk_usage(path.parent).free < rest:
        raise LpovodError(
            f"{path}: {rest / 1e9:.1f} GB are left to download, and the disk has no room for "
            "them. Free some disk space and rerun the command"
        )


def _version(response: http.client.HTTPResponse) -> str | None:
    """The value for If-Range: a strong ETag, or else the date."""
    tag = response.headers.get("ETag")
    return tag if tag and not tag.startswith("W/") else response.headers.get("Last-Modified")


def _check(remote: Remote, downloaded: Path, path: Path) -> None:
    fault = _fault(remote, downloaded)
    if fault:
        remedy = f"Remove {path} and rerun" if downloaded == path else "It was removed; rerun"
        raise LpovodError(
            f"{path} from {remote.url} {fault}. {remedy} to download it again, or {_by_hand(path)}"
        )


def _fault(remote: Remote, downloaded: Path) -> str:
    """What shows that a file is not the published one; empty if nothing does."""
    with open(downloaded, "rb") as file:
        start = file.read(64).lstrip()
        if start.startswith(b"<"):
            return "is a web page, of a login or a quota perhaps, in place of the file"
        size = downloaded.stat().st_size
        if remote.size is not None and size != remote.size:
            return f"has {size} bytes, the published file {remote.size}"
        if remote.digest is None:
            known = start.startswith(STARTS)
            return "" if known else f"starts with {start[:8]!r}, as no archive or pickle does"
        file.seek(0)
        kind = {40: "sha1", 64: "sha256"}[len(remote.digest)]
        digest = hashlib.file_digest(file, kind).hexdigest()
    same = digest == remote.digest
    return "" if same else f"has the {kind} {digest}, the published file {remote.digest}"


def _unreachable(remote: Remote, path: Path, reason: str) -> LpovodError:
    return LpovodError(f"{remote.url} cannot be downloaded: {reason}. To go on, {_by_hand(path)}")


def _by_hand(path: Path) -> str:
    return (
        "download it by hand, on another machine if necessary, save it as "
        f"{path.resolve()} and rerun the command"
    )


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def extract(archive: Path, folder: Path) -> None:
    """Extract a zip archive; existing files of the stated size stay.

    Every file gets its name when it is complete.

    Raises:
        LpovodError: if the archive is damaged; or, before anything is extracted, if a member would
            lie outside the folder or is a link.
    """
    with _opened(archive, folder) as file:
        members = [member for member in file.infolist() if not member.is_dir()]
        for member in members:
            _check_member(archive, member)
        for member in progress(members, f"extracting {archive.name}", "file"):
            target = folder / member.filename
            if not target.exists() or target.stat().st_size != member.file_size:
                _write_member(file, member, target)


def _write_member(file: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    try:
        with file.open(member) as source, open(partial, "wb") as output:
            shutil.copyfileobj(source, output, BLOCK)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _opened(archive: Path, target: Path) -> Iterator[zipfile.ZipFile]:
    """An archive to extract from; `target` is the file or folder to name if the disk is full."""
    try:
        with zipfile.ZipFile(archive) as file:
            yield file
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise LpovodError(
            f"{archive} is damaged ({error}). Remove it and rerun the command"
        ) from None
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise disk_full(target, error.errno) from None


def _check_member(archive: Path, member: zipfile.ZipInfo) -> None:
    path = PurePosixPath(member.filename)
    outside = path.is_absolute() or ".." in path.parts or "\\" in member.filename
    if outside or stat.S_ISLNK(member.external_attr >> 16):
        raise LpovodError(f"{archive}: {member.filename!r} would lie outside its folder")
