"""Stage `check`: everything that is wrong with the user's data, before any computation.

The json of every split is read whole, and the header of every image; with ``bad_images: skip``
every image is decoded. All findings come at once, as errors or warnings: the first few of each kind
and how many there are, in the log and on a page that shows the images concerned. Errors end the
run; images that `skip` leaves out are listed by id in the json, for stage `dataset`.
"""

from pathlib import Path
from typing import Literal

from lpovod.artifacts import write_json
from lpovod.exceptions import LpovodError
from lpovod.progress import log
from lpovod.stages.check.annotations import Listed, check_classes, check_json
from lpovod.stages.check.files import check_files
from lpovod.stages.check.findings import Findings
from lpovod.stages.check.page import write_page


def check(
    train_images: Path,
    train_annotations: Path,
    base: list[str],
    novel: list[str],
    bad_images: Literal["fail", "skip"],
    workers: int,
    key: str,
    output: Path,
    page: Path,
    val_images: Path | None = None,
    val_annotations: Path | None = None,
    learns: bool = True,
) -> None:
    """Check images and annotations, and write all findings.

    Args:
        train_images: folder of the training images.
        train_annotations: their COCO json.
        base: names of the base classes.
        novel: names of the novel classes.
        bad_images: skip decodes every image, and lists those that cannot be read instead of
            failing; fail reads headers, and decodes only images whose file lacks its end.
        workers: number of processes.
        key: digest of the data and of the arguments, kept in the json.
        output: json: ``findings``, ``bad_images`` (ids by split), ``counts``, ``key``. With errors
            there is none.
        page: html that shows the findings.
        val_images: folder of the validation images, if there are any.
        val_annotations: their COCO json.
        learns: whether the run learns from the training images; those of a released model, which
            learns nothing, may be the validation images.

    Raises:
        LpovodError: listing all errors.
    """
    findings = Findings(skip=bad_images == "skip")
    listed = [Listed("train", train_images, train_annotations)]
    if val_images and val_annotations:
        listed.append(Listed("val", val_images, val_annotations))
    readable = [check_json(findings, split) for split in listed]
    if all(readable):
        check_classes(findings, listed[0], listed[1] if len(listed) == 2 else None, base, novel)
    bad = _check_folders(findings, listed, readable, bad_images == "skip", workers, learns)
    errors, warnings = findings.kinds(error=True), findings.kinds(error=False)
    output.unlink(missing_ok=True)  # of earlier data
    write_page(findings, listed, base, novel, page)
    for kind in warnings:
        log.warning(findings.line(kind))
    if errors:
        lines = "\n".join(f"  {findings.line(kind)}" for kind in errors)
        remedies = f"Pictures, and what to do about each: {page}"
        raise LpovodError(f"the images or their annotations are wrong:\n{lines}\n{remedies}")
    content = {
        "key": key,
        "findings": findings.as_json(),
        "bad_images": bad,
        "counts": {
            s.split: {"images": len(s.images), "annotations": s.annotations} for s in listed
        },
    }
    write_json(output, content)
    images = sum(len(split.images) for split in listed)
    log.info(f"{images} images checked: {len(warnings)} kinds of warnings. {page}")


def _check_folders(
    findings: Findings,
    listed: list[Listed],
    readable: list[bool],
    decode: bool,
    workers: int,
    learns: bool,
) -> dict[str, list[int]]:
    """Look at the images of all splits whose json and folder exist."""
    usable = []
    for split, is_readable in zip(listed, readable, strict=True):
        if not split.folder.is_dir():
            text = f"{split.folder} (dataset.coco.{split.split}_images)"
            findings.add("folder", split.example(text))
        elif is_readable:
            usable.append(split)
    return check_files(findings, usable, decode, workers, learns)
