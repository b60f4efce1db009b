"""The page of findings: one file that loads nothing."""

from pathlib import Path
from typing import Any

from PIL import Image

from lpovod import __version__
from lpovod.artifacts import atomic
from lpovod.drawing import jpeg_uri
from lpovod.exceptions import LpovodError
from lpovod.formats.images import read_header, read_image
from lpovod.pages import templates
from lpovod.stages.check.annotations import Listed
from lpovod.stages.check.findings import KINDS, Example, Findings

TEMPLATE = "template.html.jinja"
PICTURES = 3  # per kind
PICTURE_PIXELS = 480
LARGEST_MARGIN = 0.6  # of the picture's side, for boxes that lie far outside
GUESSES = {"normalised": "as fractions", "xyxy": "as two corners"}


def write_page(
    findings: Findings, listed: list[Listed], base: list[str], novel: list[str], output: Path
) -> None:
    """Write the page.

    Args:
        findings: all of them.
        listed: the splits.
        base: names of the base classes.
        novel: names of the novel classes.
        output: one html file.
    """
    cards = [
        _card(findings, kind, error) for error in (True, False) for kind in findings.kinds(error)
    ]
    page = {
        "cards": cards,
        "errors": len(findings.kinds(error=True)),
        "warnings": len(findings.kinds(error=False)),
        "splits": listed,
        "classes": {"base": base, "novel": novel},
        "version": __version__,
    }
    environment = templates(Path(__file__).parent)
    with atomic(output) as partial:
        partial.write_text(environment.get_template(TEMPLATE).render(page), encoding="utf-8")


def _card(findings: Findings, kind: str, error: bool) -> dict[str, Any]:
    examples = findings.examples[kind]
    pictures = [p for p in (_picture(kind, example) for example in examples[:PICTURES]) if p]
    return {
        "kind": kind,
        "error": error,
        "title": KINDS[kind].title,
        "remedy": KINDS[kind].remedy,
        "counts": findings.counts[kind],
        "examples": examples,
        "more": findings.counts[kind].total() - len(examples),
        "pictures": pictures,
        "guess": GUESSES.get(kind),
    }


def _picture(kind: str, example: Example) -> dict[str, Any] | None:
    """An image, its box, and the box that was probably meant; None if it cannot be read."""
    if example.path is None or example.size is None:
        return None
    try:
        header = read_header(example.path)
        as_stored = example.size == header.stored
        size = header.stored if as_stored else header.displayed
        pixels = read_image(example.path, size)
    except LpovodError:
        return None
    width, height = size
    boxes = [("wrong", example.box)] if example.box else []
    if example.box and kind == "normalised":
        x, y, w, h = example.box
        boxes.append(("right", [x * width, y * height, w * width, h * height]))
    if example.box and kind == "xyxy":
        x, y, right, bottom = example.box
        boxes.append(("right", [x, y, right - x, bottom - y]))
    boxes = [(mark, _upright(box)) for mark, box in boxes]
    return {
        "text": example.text,
        "name": example.path.name,
        "uri": jpeg_uri(Image.fromarray(pixels), PICTURE_PIXELS),
        "size": (width, height),
        "view": _view(width, height, [box for _, box in boxes]),
        "boxes": boxes,
    }


def _upright(box: Any) -> list[float]:
    """A box with its sides positive."""
    x, y, width, height = box
    return [min(x, x + width), min(y, y + height), abs(width), abs(height)]


def _view(width: int, height: int, boxes: list[list[float]]) -> tuple[float, float, float, float]:
    """x, y, width and height of what is shown: the image, and boxes that reach beyond it."""

    def span(side: int, places: list[tuple[float, float]]) -> tuple[float, float]:
        margin, gap = LARGEST_MARGIN * side, 0.02 * max(width, height)
        low = min([0.0, *(max(start - gap, -margin) for start, _ in places if start < 0)])
        high = max(
            [float(side), *(min(end + gap, side + margin) for _, end in places if end > side)]
        )
        return low, high - low

    x, wide = span(width, [(box[0], box[0] + box[2]) for box in boxes])
    y, high = span(height, [(box[1], box[1] + box[3]) for box in boxes])
    return x, y, wide, high
