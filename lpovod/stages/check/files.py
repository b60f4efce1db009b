"""Findings in image files: headers of all, pixels of all or of the suspicious, copies in val."""

import multiprocessing
import os
import signal
import threading
import zlib
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PureWindowsPath
from typing import Any, Literal

from lpovod.artifacts import sha256
from lpovod.exceptions import LpovodError
from lpovod.formats.images import Header, ImageFault, Size, read_header, read_image
from lpovod.progress import progress
from lpovod.stages.check.annotations import Listed
from lpovod.stages.check.findings import Findings

CHUNK = 64  # images that a process looks at before it answers
FEW = 1000  # so many headers are read before a second process has started
ENDING = 4096  # bytes at the end of a file that tell it from most files of the same length


@dataclass(frozen=True)
class Look:
    """What was seen of an image file.

    Attributes:
        fault: a kind of finding, if the image cannot be read.
        reason: why.
        turned: for an image that EXIF turns, which size the json states.
        header: None if there is none.
        ending: length of the file and a checksum of its last bytes.
    """

    fault: str | None = None
    reason: str = ""
    turned: Literal["displayed", "stored", "either"] | None = None
    header: Header | None = None
    ending: tuple[int, int] | None = None


_Task = tuple[Path, Size, bool]


def check_files(
    findings: Findings, listed: list[Listed], decode: bool, workers: int, learns: bool
) -> dict[str, list[Any]]:
    """Look at the images of all splits, and compare those of train and val.

    Args:
        findings: to add to.
        listed: the splits.
        decode: decode every image; otherwise only those whose file lacks its end.
        workers: number of processes.
        learns: whether the run learns from the training images; otherwise none can leak.

    Returns:
        ids of the images that cannot be read, by split.

    Raises:
        LpovodError: if a process was killed.
    """
    bad: dict[str, list[Any]] = {"train": [], "val": []}
    endings: dict[str, dict[Any, tuple[int, int]]] = {}
    for split in listed:
        endings[split.split] = {}
        tasks = [
            (split.folder / image["file_name"], (image["width"], image["height"]), decode)
            for image in split.images.values()
        ]
        looks = _look_at_all(tasks, split.split, workers)
        for image_id, look in zip(split.images, looks, strict=True):
            _add(findings, split, image_id, look)
            if look.fault:
                bad[split.split].append(image_id)
            elif look.ending:
                endings[split.split][image_id] = look.ending
        if len(bad[split.split]) == len(split.images):
            findings.add("no_image", split.example(f"{split.path}, images in {split.folder}"))
    if len(listed) == 2 and learns:
        train, val = listed
        _check_leaks(findings, train, val, endings)
    return bad


# --- one image


def _add(findings: Findings, split: Listed, image_id: Any, look: Look) -> None:
    name = split.images[image_id]["file_name"]

    def add(kind: str, text: str) -> None:
        box = split.first_boxes.get(image_id)
        findings.add(kind, split.example(f"image {image_id}{text}", image_id, box))

    if look.fault:
        hint = ""
        if look.fault == "missing" and findings.wants_example("missing", split.split):
            hint = _near_file(split.folder, name)
        add(look.fault, f": {look.reason}{hint}")
        return
    assert look.header is not None
    header = look.header
    if look.turned:
        width, height = header.stored
        shown = f"{header.displayed[0]} x {header.displayed[1]}"
        text = f" ({name}): stored as {width} x {height}, displayed as {shown}"
        add(f"turned_{look.turned}", text)
    if header.bits > 8:
        add("deep", f" ({name}): {header.bits} bits")
    if header.alpha:
        add("alpha", f" ({name})")


def _look(task: _Task) -> Look:
    path, size, decode = task
    try:
        header = read_header(path)
        as_stored = header.read_as_stored(size)
        if decode or not header.complete:
            read_image(path, size)
    except ImageFault as fault:
        return Look(fault.kind, fault.fault)
    turned: Literal["displayed", "stored", "either"] | None = None
    if header.orientation != 1:
        either = header.displayed == header.stored
        turned = "either" if either else "stored" if as_stored else "displayed"
    return Look(turned=turned, header=header, ending=_ending(path))


def _ending(path: Path) -> tuple[int, int]:
    with open(path, "rb") as file:
        length = file.seek(0, os.SEEK_END)
        file.seek(max(0, length - ENDING))
        return length, zlib.crc32(file.read())


def _near_file(folder: Path, name: str) -> str:
    """The file that was probably meant, for the message."""
    plain = PureWindowsPath(name)
    for other in (plain.as_posix(), plain.name):
        if other != name and (folder / other).is_file():
            return f"; {other} is there"
    names = _names(folder / plain.parent.as_posix())
    near = names.get(plain.name.lower()) or names.get(plain.stem.lower())
    return f"; {near} is there" if near else ""


@cache
def _names(folder: Path) -> dict[str, str]:
    """File names by themselves and by their stems, in lower case."""
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    return {Path(n).stem.lower(): n for n in names} | {n.lower(): n for n in names}


# --- many images


def _look_at_all(tasks: list[_Task], split: str, workers: int) -> Iterator[Look]:
    chunks = [tasks[start : start + CHUNK] for start in range(0, len(tasks), CHUNK)]
    decode = any(decode for *_, decode in tasks)
    what = "decoding" if decode else "headers of"
    with progress(None, f"{what} {split} images", " images", len(tasks)) as bar:
        if workers == 1 or len(tasks) <= (CHUNK if decode else FEW):
            answers = map(_look_at, chunks)
            yield from _counted(answers, bar)
            return
        # Not forked: the parent may hold gigabytes of annotations.
        context = multiprocessing.get_context("spawn")
        try:
            with ProcessPoolExecutor(workers, context, _begin_worker) as pool:
                yield from _counted(pool.map(_look_at, chunks), bar)
        except BrokenProcessPool:
            raise LpovodError(
                "a process that reads images was killed, probably for lack of memory: take fewer "
                "threads, or divide images of many million pixels into tiles"
            ) from None


def _counted(answers: Iterator[list[Look]], bar: Any) -> Iterator[Look]:
    for looks in answers:
        bar.update(len(looks))
        yield from looks


def _look_at(chunk: list[_Task]) -> list[Look]:
    return [_look(task) for task in chunk]


def _begin_worker() -> None:
    """Leave Ctrl-C to the parent, and end with it, even if it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


# --- train and val


def _check_leaks(
    findings: Findings,
    train: Listed,
    val: Listed,
    endings: dict[str, dict[Any, tuple[int, int]]],
) -> None:
    """Find validation images with the content of a training image.

    Only files that agree in length and ending are read.
    """
    if val.path.samefile(train.path):
        findings.add("same_split", val.example(f"{val.path} is the json of both"))
        return
    by_ending: dict[tuple[int, int], list[Any]] = defaultdict(list)
    for image_id, ending in endings["train"].items():
        by_ending[ending].append(image_id)
    leaks = []
    for image_id, ending in endings["val"].items():
        suspects = by_ending.get(ending, [])
        if not suspects:
            continue
        digest = _digest(val.folder / val.images[image_id]["file_name"])
        for other in suspects:
            if _digest(train.folder / train.images[other]["file_name"]) == digest:
                leaks.append((image_id, other))
                break
    if leaks and len(leaks) == len(endings["val"]):
        text = f"{val.path}: all {len(leaks)} images are in {train.path}, too"
        findings.add("same_split", val.example(text))
        return
    for image_id, other in leaks:
        names = val.images[image_id]["file_name"], train.images[other]["file_name"]
        text = f"image {image_id} ({names[0]}) is image {other} ({names[1]}) of train"
        findings.add("leak", val.example(text, image_id))


@cache
def _digest(path: Path) -> str:
    return sha256(path)
