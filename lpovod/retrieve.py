"""Query the regions of a finished run with any words: ``python -m lpovod.retrieve "a unicycle"``.

Prints the most similar regions of the training images and draws them on one sheet. Any number of
queries takes one pass over the index. Nothing of the run is changed; to make a class of the words,
add them to `classes.novel`.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from PIL import Image, ImageDraw

from lpovod.artifacts import LpovodError
from lpovod.config import PseudoLabels, read_config
from lpovod.dataset import CocoDataset, read_dataset
from lpovod.progress import say
from lpovod.pseudo_labels import check_belong, queries, top_regions
from lpovod.region_index import open_index, open_shards
from lpovod.text_embeddings import embed_texts

TILE, CAPTION, COLUMNS = 192, 16, 5  # of the sheet, in pixels


@dataclass
class Options:
    texts: Annotated[tuple[str, ...], tyro.conf.Positional]
    """what to look for"""
    configfile: tuple[Path, ...] = ()
    """overlays of config.yaml, as the run had them"""
    results: Path | None = None
    """folder of the run; without it results/<name of the config>"""
    k: int = 10
    """regions per text"""
    objectness: float | None = None
    """floor of a region's objectness; without it the config's"""
    sheet: Path = Path("retrieved.png")
    """where the regions are drawn"""


def retrieve(options: Options) -> list[list[dict]]:
    """Find, print and draw the regions most similar to each text.

    Returns:
        For each text its regions, best first: ``image_id``, ``bbox``, ``score``, ``cosine``.

    Raises:
        LpovodError: if the run has no index yet, or its files do not belong together.
    """
    settings = read_config([Path("config.yaml"), *options.configfile])
    results = options.results or Path("results") / settings.name
    dataset, index = results / "dataset" / "train.json", results / "region_index" / "train.index"
    if not index.exists():
        raise LpovodError(f"{index}: no such file. Make it first: snakemake --cores all {index}")
    store = open_shards((results / "region_embeddings" / "train").glob("*.h5"))
    searched = open_index(index)
    limits = settings.pseudo_labels.model_dump() | {"k": options.k}
    if options.objectness is not None:
        limits["objectness"] = options.objectness
    limits = PseudoLabels.model_validate(limits)
    asked, base = len(options.texts), settings.classes.base if limits.centred else []
    classes = embed_texts([*options.texts, *base], settings.clip, settings.text_embeddings)
    check_belong([classes], store, searched, dataset)
    vectors = queries(classes.vectors[:asked], classes.vectors[asked:], limits)
    found = top_regions(searched, store, vectors, limits)
    for text, regions in zip(options.texts, found, strict=True):
        _print(text, regions)
    _draw(options.texts, found, read_dataset(dataset), options.sheet)
    say(f"drawn: {options.sheet}")
    return found


def _print(text: str, regions: list[dict]) -> None:
    print(f"{text}\n{'image':>12}  {'x1':>7} {'y1':>7} {'x2':>7} {'y2':>7}  objectness  cosine")
    for region in regions:
        x, y, width, height = region["bbox"]
        box = " ".join(f"{side:7.1f}" for side in (x, y, x + width, y + height))
        print(f"{region['image_id']:12}  {box}  {region['score']:10.3f}  {region['cosine']:6.4f}")


def _draw(texts: tuple[str, ...], found: list[list[dict]], data: CocoDataset, output: Path) -> None:
    """One sheet: under each text its regions, marked in their images."""
    lines = [max(-(-len(regions) // COLUMNS), 1) for regions in found]
    height = sum(CAPTION + line * (TILE + CAPTION) for line in lines)
    sheet = Image.new("RGB", (COLUMNS * TILE, height), "white")
    pen, top = ImageDraw.Draw(sheet), 0
    for text, regions, line in zip(texts, found, lines, strict=True):
        pen.text((2, top + 2), text, "black")
        for place, region in enumerate(regions):
            row, column = divmod(place, COLUMNS)
            corner = column * TILE, top + CAPTION + row * (TILE + CAPTION)
            sheet.paste(_tile(data.load(region["image_id"]), region["bbox"]), corner)
            words = f"{region['image_id']}  {region['cosine']:.3f}"
            pen.text((corner[0] + 2, corner[1] + TILE + 1), words, "black")
        top += CAPTION + line * (TILE + CAPTION)
    output.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(output)


def _tile(pixels: np.ndarray, bbox: list[float]) -> Image.Image:
    image = Image.fromarray(pixels)
    scale = TILE / max(image.size)
    image = image.resize([max(round(side * scale), 1) for side in image.size])
    x, y, width, height = (scale * side for side in bbox)
    box = (x, y, max(x + width - 1, x), max(y + height - 1, y))
    ImageDraw.Draw(image).rectangle(box, outline="red", width=2)
    return image


if __name__ == "__main__":
    try:
        retrieve(tyro.cli(Options))
    except LpovodError as error:
        sys.exit(f"error: {error}")
