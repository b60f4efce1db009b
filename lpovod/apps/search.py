"""`lpovod search`: the regions of a finished run that are most similar to any words.

All texts together take one pass over the index.
"""

from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from PIL import Image, ImageDraw
from pydantic import ValidationError

from lpovod.clip import embed_texts
from lpovod.config import PseudoLabelsSettings, read_config
from lpovod.exceptions import LpovodError, UsageError
from lpovod.formats.coco import CocoDataset, read_dataset
from lpovod.formats.index import open_index
from lpovod.formats.regions import open_shards, shards_in
from lpovod.progress import log
from lpovod.search import check_belong, queries, top_regions

TILE, CAPTION, COLUMNS = 192, 16, 5  # TILE and CAPTION in pixels of the sheet


def search(
    texts: Annotated[tuple[str, ...], tyro.conf.Positional],
    configfile: tuple[Path, ...] = (),
    results: Path | None = None,
    k: int = 10,
    objectness: float | None = None,
    output: Path = Path("retrieved.png"),
) -> list[list[dict]]:
    """Print and draw the regions of the training images that are most similar to any words.

    The ranking is that of stage `pseudo_labels` for a class of that name. The run does not change;
    to make the words a class, add them to classes.novel.

    Args:
        texts: words to search for: "a star" "a fish"
        configfile: overlays of config.yaml that the run used
        results: folder of the run; by default results/<name of the configuration>
        k: number of regions per text
        objectness: minimum objectness of a region; by default the configuration's
        output: picture of the regions

    Returns:
        For each text, its regions, best first: ``image_id``, ``bbox``, ``score``, ``cosine``.

    Raises:
        UsageError: if no text is given, or a limit is out of range.
        LpovodError: if the run has no index yet, or its files do not belong together.
    """
    if not texts:
        raise UsageError('name something to search for: lpovod search "a star"')
    config = read_config([Path("config.yaml"), *configfile])
    limits = _limits(config.pseudo_labels, k, objectness)
    results = results or Path("results") / config.name
    dataset, index = (
        results / "dataset" / "train.images.json",
        results / "region_index" / "train.index",
    )
    if not index.exists():
        raise LpovodError(f"{index}: no such file. Make it first: snakemake --cores all {index}")
    stage = "region_embeddings"
    store = open_shards(shards_in(results / stage / "train"), stage)
    region_index = open_index(index)
    base = config.classes.base if limits.centred else []
    classes = embed_texts(
        [*texts, *base], config.clip, config.text_embeddings, config.classes.prompts
    )
    check_belong([classes], store, region_index, dataset)
    count = len(texts)
    vectors = queries(classes.vectors[:count], classes.vectors[count:], limits)
    regions_of = top_regions(region_index, store, vectors, limits)
    for text, regions in zip(texts, regions_of, strict=True):
        _print(text, regions)
    _draw(texts, regions_of, read_dataset(dataset), output)
    log.info(f"drawn: {output}")
    return regions_of


def _limits(
    settings: PseudoLabelsSettings, k: int, objectness: float | None
) -> PseudoLabelsSettings:
    values = settings.model_dump() | {"k": k}
    if objectness is not None:
        values["objectness"] = objectness
    try:
        return PseudoLabelsSettings.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        raise UsageError(f"--{problem['loc'][0]} {problem['input']}: {problem['msg']}") from None


def _print(text: str, regions: list[dict]) -> None:
    print(f"{text}\n{'image':>12}  {'x1':>7} {'y1':>7} {'x2':>7} {'y2':>7}  objectness  cosine")
    for region in regions:
        x, y, width, height = region["bbox"]
        box = " ".join(f"{side:7.1f}" for side in (x, y, x + width, y + height))
        print(f"{region['image_id']:12}  {box}  {region['score']:10.3f}  {region['cosine']:6.4f}")


def _draw(
    texts: tuple[str, ...], regions_of: list[list[dict]], data: CocoDataset, output: Path
) -> None:
    """Draw one sheet: each text, and below it its regions, marked in their images."""
    lines = [max(-(-len(regions) // COLUMNS), 1) for regions in regions_of]
    height = sum(CAPTION + line * (TILE + CAPTION) for line in lines)
    sheet = Image.new("RGB", (COLUMNS * TILE, height), "white")
    pen, top = ImageDraw.Draw(sheet), 0
    for text, regions, line in zip(texts, regions_of, lines, strict=True):
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
