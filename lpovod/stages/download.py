"""Stage `download`: public files, resumed after an interruption, checked, whole under their name.

A download goes on where it was cut off, unless the server's file has changed since (its ETag or
date says so): bytes of two versions are never joined. What is in its place already is used.

COCO publishes no digests: those here are the SHA-1 that GluonCV's download script has recorded, and
the sizes those of other public code; neither was checked against the server. OpenAI's address of a
CLIP model contains the file's SHA-256.
"""

import hashlib
import http.client
import json
import shutil
import stat
import time
import urllib.request
import zipfile
from pathlib import Path, PurePosixPath

from lpovod.artifacts import write_json
from lpovod.catalogue import COCO, COCO_CONTENT, WEIGHTS, Remote
from lpovod.exceptions import DISK_FULL, LpovodError, disk_full
from lpovod.progress import log, progress

BLOCK = 1 << 20
TRIES = 6  # in a row without a single new byte
LONGEST_PAUSE = 60.0  # seconds
TEMPORARY = {408, 429, 500, 502, 503, 504}


def download_coco(archive: str, root: Path, record: Path) -> None:
    """Have the content of one of COCO's archives below a folder.

    Args:
        archive: its name, a key of `COCO`.
        root: the folder; what is there already is used in place. The archive itself is removed
            once it is extracted.
        record: output, json: written when all is there.
    """
    unfinished = root / f".{archive}.unfinished"
    present = all((root / path).exists() for path in COCO_CONTENT[archive])
    if present and not unfinished.exists():
        log.info(f"{root} has {', '.join(COCO_CONTENT[archive])} already")
    else:
        root.mkdir(parents=True, exist_ok=True)
        unfinished.touch()
        download(COCO[archive], root / archive)
        extract(root / archive, root)
        (root / archive).unlink()
        unfinished.unlink()
    write_json(record, {"content": COCO_CONTENT[archive], "url": COCO[archive].url})


def download_weights(output: Path) -> None:
    """Download published weights, recognised by the name of the output."""
    download(WEIGHTS[output.name], output)


def download(remote: Remote, path: Path, pause: float = 1.0) -> None:
    """Download a file; one that is there already is only checked.

    Args:
        remote: what to download.
        path: where to; beside it lies the unfinished part.
        pause: seconds before the second attempt; every further pause is twice as long.

    Raises:
        LpovodError: naming the address, what went wrong and what to do by hand: if the server
            cannot be reached or refuses, the disk is full, or the file is not the published one.
    """
    if path.exists():
        _check(remote, path, path)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, version = (path.with_name(f".{path.name}.{end}") for end in ("partial", "version"))
    failures = 0
    while True:
        before = _size(partial)
        try:
            _receive(remote, path, partial, version)
            break
        except urllib.error.HTTPError as error:
            reason = f"it answers {error.code} {error.reason}"
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
    try:
        _check(remote, partial, path)
    except LpovodError:
        partial.unlink()
        raise
    finally:
        version.unlink(missing_ok=True)
    partial.replace(path)


def _receive(remote: Remote, path: Path, partial: Path, version: Path) -> None:
    """Append to `partial` what is missing of it, or all if the server's file is another one."""
    request = urllib.request.Request(remote.url)
    known = json.loads(version.read_text()) if version.exists() else None
    have = _size(partial) if known else 0
    if known and have:
        request.add_header("Range", f"bytes={have}-")
        request.add_header("If-Range", known)
    try:
        response = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        # Nothing is left to send, or the file has become shorter; the check will tell.
        if error.headers.get("Content-Range") != f"bytes */{have}":
            partial.unlink()
            raise ConnectionError("the file has changed; starting again") from None
        return
    with response:
        stated = _version(response)
        if have and (response.status != 206 or stated != known):
            if response.status == 206:
                partial.unlink()
                raise ConnectionError("the file has changed; starting again")
            log.info(f"{remote.url} has changed or cannot be resumed: starting again")
            have = 0
        if have and not response.headers["Content-Range"].startswith(f"bytes {have}-"):
            partial.unlink()
            raise ConnectionError("the server sent another part than it was asked for")
        rest = int(response.headers.get("Content-Length", 0))
        if shutil.disk_usage(path.parent).free < rest:
            raise LpovodError(
                f"{path}: {rest / 1e9:.1f} GB are to come, and the disk has no room for them"
            )
        # Without a version there is no telling whether a rest belongs to the same file.
        version.unlink(missing_ok=True)
        with open(partial, "ab" if have else "wb") as file:
            if stated:
                version.write_text(json.dumps(stated))
            _copy(response, file, path.name, have, rest)
    if rest and _size(partial) < have + rest:
        raise ConnectionError(f"the connection broke off after {_size(partial)} bytes")


def _copy(response: http.client.HTTPResponse, file, name: str, have: int, rest: int) -> None:
    total = have + rest if rest else None
    with progress(None, name, "B", total, initial=have, unit_scale=True) as bar:
        while block := response.read(BLOCK):
            file.write(block)
            bar.update(len(block))


def _version(response: http.client.HTTPResponse) -> str | None:
    """What If-Range accepts: a strong ETag, or else the date."""
    tag = response.headers.get("ETag")
    return tag if tag and not tag.startswith("W/") else response.headers.get("Last-Modified")


def _check(remote: Remote, found: Path, path: Path) -> None:
    if remote.size is not None and found.stat().st_size != remote.size:
        wrong = f"has {found.stat().st_size} bytes, {remote.size} are published"
    else:
        kind = {40: "sha1", 64: "sha256"}[len(remote.digest)]
        with open(found, "rb") as file:
            digest = hashlib.file_digest(file, kind).hexdigest()
        if digest == remote.digest:
            return
        wrong = f"has the {kind} {digest}, {remote.digest} is published"
    remedy = f"Remove {path}" if found == path else "It was removed"
    raise LpovodError(f"{path} from {remote.url} {wrong}. {remedy}; run again to download it anew")


def _unreachable(remote: Remote, path: Path, reason: str) -> LpovodError:
    return LpovodError(
        f"{remote.url} cannot be downloaded: {reason}. Download it by hand, on another machine if "
        f"need be, put it at {path.resolve()} and run again"
    )


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def extract(archive: Path, folder: Path) -> None:
    """Extract a zip archive; files that are there with the stated size stay.

    Every file gets its name when it is whole.

    Raises:
        LpovodError: if the archive is damaged, or a member would lie outside the folder or is a
            link; nothing is extracted then.
    """
    try:
        with zipfile.ZipFile(archive) as file:
            members = [member for member in file.infolist() if not member.is_dir()]
            for member in members:
                _check_member(archive, member)
            for member in progress(members, f"extracting {archive.name}", "file"):
                target = folder / member.filename
                if target.exists() and target.stat().st_size == member.file_size:
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                partial = target.with_name(f".{target.name}.partial")
                with file.open(member) as source, open(partial, "wb") as output:
                    shutil.copyfileobj(source, output, BLOCK)
                partial.replace(target)
    except (zipfile.BadZipFile, EOFError) as error:
        raise LpovodError(f"{archive} is damaged ({error}). Remove it and run again") from None
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise disk_full(folder, error.errno) from None


def _check_member(archive: Path, member: zipfile.ZipInfo) -> None:
    path = PurePosixPath(member.filename)
    outside = path.is_absolute() or ".." in path.parts or "\\" in member.filename
    if outside or stat.S_ISLNK(member.external_attr >> 16):
        raise LpovodError(f"{archive}: {member.filename!r} would lie outside its folder")
