"""Stage `download`: public files, resumed after an interruption, checked, whole under their name.

A download goes on where it was cut off, unless the server's file has changed since (its ETag or
date says so): bytes of two versions are never joined. What is in its place already is used.

COCO publishes no digests: those here are the SHA-1 that GluonCV's download script has recorded, and
the sizes those of other public code; neither was checked against the server. OpenAI's address of a
CLIP model contains the file's SHA-256.
"""

import errno
import hashlib
import http.client
import json
import shutil
import stat
import time
import urllib.error
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from lpovod.artifacts import LpovodError, write_json
from lpovod.progress import progress, say

BLOCK = 1 << 20
TRIES = 6  # in a row without a single new byte
LONGEST_PAUSE = 60.0  # seconds
DISK_FULL = {errno.ENOSPC, errno.EDQUOT}
TEMPORARY = {408, 429, 500, 502, 503, 504}


@dataclass(frozen=True)
class Remote:
    """A public file.

    Attributes:
        url: where it is.
        digest: its SHA-1 or SHA-256, hexadecimal; told apart by length.
        size: in bytes, where known.
    """

    url: str
    digest: str
    size: int | None = None


COCO = {
    "annotations_trainval2017.zip": Remote(
        "http://images.cocodataset.org/annotations/annotations_trainval2017.zip",
        "8551ee4bb5860311e79dace7e79cb91e432e78b3",
        252_907_541,
    ),
    "val2017.zip": Remote(
        "http://images.cocodataset.org/zips/val2017.zip",
        "4950dc9d00dbe1c933ee0170f5797584351d2a41",
        815_585_330,
    ),
    "train2017.zip": Remote(
        "http://images.cocodataset.org/zips/train2017.zip",
        "10ad623668ab00c62c096f0ed636d6aff41faca5",
        19_336_861_798,
    ),
}
"""The archives of COCO 2017 by their names."""

COCO_IMAGES = {"train": 118_287, "val": 5_000}
"""How many images its splits have."""

COCO_CONTENT = {
    "annotations_trainval2017.zip": (
        "annotations/instances_train2017.json",
        "annotations/instances_val2017.json",
    ),
    "val2017.zip": ("val2017",),
    "train2017.zip": ("train2017",),
}
"""What of an archive is used: where that is, nothing is downloaded."""

_NAMES = """
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light,
fire hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant,
bear, zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard,
sports ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle,
wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot,
hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop,
mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock,
vase, scissors, teddy bear, hair drier, toothbrush
"""
COCO_CLASSES = tuple(name.strip() for name in _NAMES.split(","))
"""Names of the annotated classes, to check a configuration before the annotations are there."""

WEIGHTS = {
    "ViT-B-32.pt": Remote(
        "https://openaipublic.azureedge.net/clip/models/"
        "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af/ViT-B-32.pt",
        "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
    )
}
"""Weights that are downloaded where a file of this name is asked for and missing."""


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
        say(f"{root} has {', '.join(COCO_CONTENT[archive])} already")
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
            if getattr(error, "errno", None) in DISK_FULL:
                raise LpovodError(
                    f"{partial}: the disk is full. Make room and run again: what is there is kept"
                ) from None
            reason = str(getattr(error, "reason", error)) or type(error).__name__
        failures = 1 if _size(partial) > before else failures + 1
        if failures == TRIES:
            raise _unreachable(remote, path, reason)
        wait = min(LONGEST_PAUSE, pause * 2 ** (failures - 1))
        say(f"{remote.url}: {reason}; next attempt in {wait:.0f} s")
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
    if have:
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
            say(f"{remote.url} has changed or cannot be resumed: starting again")
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
        raise LpovodError(f"{folder}: the disk is full. Make room and run again") from None


def _check_member(archive: Path, member: zipfile.ZipInfo) -> None:
    path = PurePosixPath(member.filename)
    outside = path.is_absolute() or ".." in path.parts or "\\" in member.filename
    if outside or stat.S_ISLNK(member.external_attr >> 16):
        raise LpovodError(f"{archive}: {member.filename!r} would lie outside its folder")
