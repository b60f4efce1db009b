"""`lpovod adopt`: from a folder of photographs to the overlay of a run.

    lpovod adopt /data/street --novel unicycle "traffic cone"

looks at what the folder holds, makes a validation split if there is none, and writes one overlay.
Images are neither copied nor moved.
"""

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import textwrap
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import tyro
import yaml

from lpovod.apps.adopt.look import Content, Found, counted, look
from lpovod.apps.adopt.overlay import SHARED, Adopted, overlay, run_name
from lpovod.artifacts import atomic, write_json
from lpovod.catalogue import FILES
from lpovod.config import Config, load_config, merge
from lpovod.exceptions import LpovodError, UsageError, did_you_mean, existing

DEFAULTS = Path("config.yaml")
FEW_BOXES = 10  # of a base class, below which it is mentioned
WIDTH = 95


def adopt(
    folder: Annotated[Path, tyro.conf.Positional],
    labels: tuple[Path, ...] = (),
    base: tuple[str, ...] = (),
    novel: tuple[str, ...] = (),
    name: str | None = None,
    output: Path | None = None,
    val_fraction: float = 0.2,
    seed: int = 0,
    gpu: tyro.conf.FlagCreatePairsOff[bool] = False,
    cpu: tyro.conf.FlagCreatePairsOff[bool] = False,
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False,
) -> str:
    """Look at a folder of photographs and write the overlay of a run on them.

    Reads COCO json, YOLO folders, Pascal VOC xml and LabelMe json. Labels that are not COCO's, and
    a split that has to be made, are written to data/NAME/ as COCO json; images stay where they are.

    Args:
        folder: holds the images, in subfolders too
        labels: files or a folder with the labels, if they are elsewhere or several could be meant;
            two COCO files are those of the training and of the validation images
        base: annotated classes that the detector learns from; by default all but the novel ones
        novel: classes to find by name alone, labelled or not; 狗="dog" gives CLIP other words
        name: of the run, results/NAME/; by default the folder's
        output: the overlay; by default NAME.yaml
        val_fraction: fraction of the labelled images to validate on, where the labels have no such
            split; near-copies stay together; 0 measures nothing
        seed: of the split
        gpu: write settings for one GPU, the default where this machine has one
        cpu: write settings for a machine without a GPU: smaller images, fewer epochs and proposals
        overwrite: replace an overlay or data files that are there and differ

    Returns:
        What to do next.

    Raises:
        UsageError: if the command line is contradictory, or several labels could be meant.
        LpovodError: if there is nothing to learn from, or labels are wrong.
    """
    if gpu and cpu:
        raise UsageError("--gpu and --cpu exclude one another")
    if not 0 <= val_fraction < 1:
        raise UsageError("--val-fraction must be at least 0 and less than 1")
    for path in (DEFAULTS, SHARED):
        if not path.is_file():
            raise UsageError(f"{path}: no such file. Run this command in the workflow's folder")
    name = name or run_name(folder)
    output = output or Path(f"{name}.yaml")
    found = look(folder, labels)
    made = _make_val(found, val_fraction, seed)
    print(_summary(folder, found, made))
    if found.errors:
        raise LpovodError(
            "labels to correct first; nothing was written:\n  " + _lines(found.errors)
        )
    classes = _classes(found, base, novel)
    print(_class_summary(found, *classes))
    if not classes[1]:
        raise LpovodError(
            "no novel class: name what should be found without labels, --novel NAME NAME ... "
            "Nothing was written."
        )
    files = {s: c.json or Path("data", name, f"{s}.json") for s, c in found.splits.items()}
    with_gpu = gpu or not cpu and _has_gpu()
    command = _command(folder, labels, base, novel, name, output, val_fraction, seed, with_gpu)
    adopted = Adopted(name, found.splits, files, *classes, with_gpu, command)
    text = overlay(adopted, output)
    config = _checked(text)
    written = _write(adopted, text, output, overwrite)
    print(written)
    return _next(adopted, found, config, output)


def _make_val(found: Found, fraction: float, seed: int) -> bool:
    """Replace the splits by train and val; True if val was made from train."""
    if "train" not in found.splits:
        raise LpovodError(f"{_all(found)}: no training images, only {', '.join(found.splits)}")
    if "test" in found.splits:
        count = len(found.splits.pop("test").coco["images"])
        found.notes["images of the test split are not used"] += [f"{count} images"]
    if "val" in found.splits or fraction == 0:
        return False
    train = found.splits["train"]
    chosen = choose_val(train, fraction, seed)
    if not chosen:
        found.notes["images are too few for a validation split: nothing is measured"] += [
            str(train.root)
        ]
        return False
    for split, wanted in (("train", False), ("val", True)):
        images = [i for i in train.coco["images"] if (i["id"] in chosen) == wanted]
        boxes = [a for a in train.coco["annotations"] if (a["image_id"] in chosen) == wanted]
        coco = {"images": images, "annotations": boxes, "categories": train.coco["categories"]}
        found.splits[split] = Content(train.root, coco)
    return True


def choose_val(content: Content, fraction: float, seed: int) -> set[Any]:
    """Ids of the images to validate on, of those that are labelled.

    Groups of near-copies stay together. Their order is drawn from the seed and the name of each
    group's first file, so that an image that is added later leaves most others where they are. No
    class loses its last training image.

    Args:
        content: all images.
        fraction: of the labelled images, approached from below where a group does not fit.
        seed: of the order.
    """
    from lpovod.formats.near_copies import groups

    images = content.coco["images"]
    classes: dict[Any, set[Any]] = {image["id"]: set() for image in images}
    for annotation in content.coco["annotations"]:
        classes[annotation["image_id"]].add(annotation["category_id"])
    left = Counter(c for of_image in classes.values() for c in of_image)
    chosen: set[Any] = set()
    wanted = round(fraction * (len(images) - len(content.unlabelled)))
    grouped = [[images[place] for place in group] for group in groups(content.paths())]

    def order(group: list[dict[str, Any]]) -> str:
        first = min(str(image["file_name"]) for image in group)
        return hashlib.sha256(f"{seed} {first}".encode()).hexdigest()

    for group in sorted(grouped, key=order):
        ids = [image["id"] for image in group]
        if not content.unlabelled.isdisjoint(ids):
            continue
        lost = Counter(c for i in ids for c in classes[i])
        if len(chosen) + len(ids) <= wanted and all(left[c] > n for c, n in lost.items()):
            chosen |= {*ids}
            left -= lost
    return chosen


def _classes(
    found: Found, base: tuple[str, ...], novel: tuple[str, ...]
) -> tuple[list[str], dict[str, str | None]]:
    """Base classes, and the prompts (or None) of the novel ones."""
    annotated = found.splits["train"].counts()
    names: dict[str, str | None] = {}
    for word in novel:
        left, equals, right = word.partition("=")
        names[left.strip()] = right.strip() if equals else None
    both = [name for name in base if name in names]
    if both:
        raise UsageError(f"{both[0]!r} is both a base and a novel class")
    for name in base:
        if name not in annotated:
            hint = did_you_mean(name, annotated) or f"annotated are {', '.join(annotated)}"
            raise LpovodError(f"--base: no training image is annotated with {name!r}; {hint}")
    chosen = list(base) or [name for name in annotated if name not in names]
    if not chosen:
        raise LpovodError(
            f"{_all(found)}: no box of a base class in the training images. The detector learns "
            "from boxes of a few classes: label some, and run the same command again"
        )
    return chosen, names


def _summary(folder: Path, found: Found, made: bool) -> str:
    def below(path: Path) -> str:
        return os.path.relpath(path, folder) if path.is_relative_to(folder) else str(path)

    places = ", ".join(below(path) for path in found.labels)
    lines = [f"{folder}: {found.format} ({places})"]
    for split, content in found.splits.items():
        boxes = len(content.coco["annotations"])
        origin = " (made: the labels have no validation split)" if made and split == "val" else ""
        count = f"{len(content.coco['images']):,} images, {boxes:,} boxes"
        lines.append(f"  {split:9} {count}, in {below(content.root)}{origin}")
    smallest, usual, largest = _sizes(found)
    same = smallest == largest
    lines.append(
        f"  sizes     {_size(usual)}"
        + ("" if same else f" most often; {_size(smallest)} to {_size(largest)}")
    )
    return "\n".join([*lines, *_noted("notes", counted(found.notes))])


def _class_summary(found: Found, base: list[str], novel: dict[str, str | None]) -> str:
    train = found.splits["train"].counts()
    val = found.splits["val"].counts() if "val" in found.splits else {}
    ordered = sorted(base, key=lambda name: -train[name][1])
    shown = [f"{name} {train[name][1]:,}" for name in ordered[:20]]
    rest = f" and {len(ordered) - 20} more" if len(ordered) > 20 else ""
    lines = _noted("base", [f"{len(base)}, by boxes in train: {', '.join(shown)}{rest}"])
    measured = [
        f"{name} ({val[name][1]:,} boxes in val)" if name in val else f"{name} (not annotated)"
        for name in novel
    ]
    lines += _noted("novel", [", ".join(measured) or "none yet"])
    few = [name for name in ordered if train[name][1] < FEW_BOXES]
    if few:
        some = ", ".join(few[:5]) + (" ..." if len(few) > 5 else "")
        lines += _noted("", [f"{len(few)} base classes have fewer than {FEW_BOXES} boxes: {some}"])
    unused = [name for name in {**train, **val} if name not in base and name not in novel]
    if unused:
        some = ", ".join(unused[:5]) + (" ..." if len(unused) > 5 else "")
        lines += _noted("unused", [f"{len(unused)} annotated classes: {some}"])
    foreign = [n for n, prompt in novel.items() if prompt is None and not n.isascii()]
    if foreign:
        lines += _noted(
            "", [f"CLIP reads English; give it other words: --novel {foreign[0]}=WORDS"]
        )
    return "\n".join(lines)


def _noted(title: str, texts: list[str]) -> list[str]:
    lines: list[str] = []
    for text in texts:
        head = title if not lines else ""
        lines.append(
            textwrap.fill(
                text,
                WIDTH,
                initial_indent=f"  {head:9} ",
                subsequent_indent=" " * 12,
                break_long_words=False,
                break_on_hyphens=False,
            )
        )
    return lines


def _all(found: Found) -> str:
    return ", ".join(map(str, found.labels))


def _lines(findings: dict[str, list[str]]) -> str:
    return "\n  ".join(counted(findings))


def _sizes(found: Found) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Width and height: of the smallest image, the most frequent, and of the largest."""
    sizes = Counter(
        (image["width"], image["height"])
        for c in found.splits.values()
        for image in c.coco["images"]
    )

    def area(size: tuple[int, int]) -> int:
        return size[0] * size[1]

    return min(sizes, key=area), sizes.most_common(1)[0][0], max(sizes, key=area)


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


def _has_gpu() -> bool:
    """Whether NVIDIA's driver lists a GPU; torch would take seconds to say so."""
    if not shutil.which("nvidia-smi"):
        return False
    done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    return done.returncode == 0 and done.stdout.startswith("GPU")


def _command(
    folder: Path,
    labels: tuple[Path, ...],
    base: tuple[str, ...],
    novel: tuple[str, ...],
    name: str,
    output: Path,
    val_fraction: float,
    seed: int,
    gpu: bool,
) -> str:
    """The command line that gives the same overlay, on any machine."""
    words = ["lpovod", "adopt", str(folder)]
    for option, values in (("--labels", labels), ("--base", base), ("--novel", novel)):
        words += [option, *map(str, values)] if values else []
    if name != run_name(folder):
        words += ["--name", name]
    if output != Path(f"{name}.yaml"):
        words += ["--output", str(output)]
    if val_fraction != 0.2:
        words += ["--val-fraction", f"{val_fraction:g}"]
    if seed:
        words += ["--seed", str(seed)]
    return shlex.join([*words, "--gpu" if gpu else "--cpu"])


def _checked(text: str) -> Config:
    """The configuration that the overlay gives, before it is written."""
    content: dict[str, Any] = {}
    for path in (DEFAULTS, SHARED):
        content = merge(content, yaml.safe_load(existing(path).read_text()))
    return load_config(merge(content, yaml.safe_load(text)), weights=False)


def _write(adopted: Adopted, text: str, output: Path, overwrite: bool) -> str:
    """Write what is new; refuse, before anything is written, to replace what differs."""
    new = {
        adopted.json[split]: content.coco
        for split, content in adopted.splits.items()
        if content.json is None
    }
    differing = [p for p, coco in new.items() if p.exists() and _json(p) != coco]
    if output.exists() and output.read_text(encoding="utf-8") != text:
        differing.append(output)
    if differing and not overwrite:
        remedy = (
            "--output OTHER.yaml keeps it"
            if differing == [output]
            else "--name OTHER --output OTHER.yaml keeps all of them"
        )
        raise LpovodError(
            f"{', '.join(map(str, differing))}: exists, and differs from what would be written. "
            f"{remedy}; --overwrite replaces it"
        )
    for path, coco in new.items():
        if not path.exists() or path in differing:
            write_json(path, coco)
    with atomic(output) as partial:
        partial.write_text(text, encoding="utf-8")
    return "\n".join(["", *(f"wrote {path}" for path in (*new, output))])


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None


def _next(adopted: Adopted, found: Found, config: Config, output: Path) -> str:
    """The plan, and the commands to go on with."""
    train, val = (
        len(adopted.splits[split].coco["images"]) if split in adopted.splits else 0
        for split in ("train", "val")
    )
    usual = _sizes(found)[1]
    # torch, which counts the networks' operations, takes seconds to import.
    from lpovod.apps.plan import GFLOPS, TFLOPS, costs, table

    rows, cores = costs(config, train, val, usual), os.cpu_count() or 1
    if config.gpu:
        times = {"1 GPU": [row.on_gpus(TFLOPS, 1) for row in rows]}
    else:
        machine = "1 core" if cores == 1 else f"{cores} cores"
        times = {machine: [row.on_cores(GFLOPS, cores) for row in rows]}
    downloads = [
        f"{path.name}, {(FILES[path.name].size or 0) / 1e6:,.0f} MB"
        for path in (config.clip.weights, config.backbone.weights)
        if path and not path.is_file() and path.name in FILES
    ]
    files = f"{SHARED} {shlex.quote(str(output))}"
    exact = f"--images {train} {val} --size {usual[0]} {usual[1]}"
    lines = [
        f"About this long (half or twice), for {train:,} + {val:,} images:",
        "",
        table(rows, times),
        "",
        *([f"Downloaded first: {'; '.join(downloads)}", ""] if downloads else []),
        "Next:",
        f"  snakemake -n --configfile {files}            # what would run",
        f"  snakemake --cores all --configfile {files}   # run it",
        f"  lpovod plan {DEFAULTS} {files} {exact}",
    ]
    return "\n".join(lines)
