"""Stage `pictures`: the README's pictures, from a finished run. Not part of the default run."""

import shutil
import subprocess
import tempfile
from collections import defaultdict
from pathlib import Path

from PIL import Image

from lpovod.artifacts import atomic
from lpovod.drawing import choose_images, draw_detections
from lpovod.exceptions import LpovodError
from lpovod.formats.coco import read_dataset, read_results
from lpovod.measures.ablations import read_metrics
from lpovod.progress import log

TILE, GAP, COLUMNS, ROWS = 300, 8, 3, 2  # TILE and GAP in pixels, of the picture of detections
PAGE = (1200, 1420)  # size of the browser's window in pixels
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def draw_pictures(
    metrics: Path, detections: Path, dataset: Path, report: Path, scenes: Path, page: Path
) -> None:
    """Draw validation images with their detections, and photograph the report in a browser.

    Args:
        metrics: json of stage `evaluation`.
        detections: COCO results of the full method.
        dataset: json of the evaluated split.
        report: the page of stage `report`.
        scenes: output, png, of the detections.
        page: output, png, of the report.

    Raises:
        LpovodError: if no browser is installed.
    """
    classes = read_metrics(metrics)["classes"]
    data = read_dataset(dataset).of_classes(classes["base"], classes["novel"])
    names = {i: c["name"] for i, c in data.categories.items()}
    results = defaultdict(list)
    for result in sorted(read_results(detections, data), key=lambda r: -r["score"]):
        results[result["image_id"]].append(result)
    selected = choose_images(data, classes["base"], classes["novel"], COLUMNS * ROWS)
    sheet = Image.new("RGB", [n * TILE + (n - 1) * GAP for n in (COLUMNS, ROWS)], "white")
    for place, image_id in enumerate(selected):
        best = results[image_id][: len(data.boxes(image_id)[0])]
        tile = draw_detections(
            data.load(image_id),
            [r["bbox"] for r in best],
            [f"{names[r['category_id']]} {r['score']:.2f}" for r in best],
            [names[r["category_id"]] in classes["novel"] for r in best],
            TILE,
        )
        row, column = divmod(place, COLUMNS)
        sheet.paste(tile, (column * (TILE + GAP), row * (TILE + GAP)))
    with atomic(scenes) as partial:
        sheet.quantize(256).save(partial, "PNG", optimize=True)
    _photograph(report, page)
    log.info(f"{scenes}, {page}")


def _photograph(report: Path, page: Path) -> None:
    browser = next((b for b in BROWSERS if shutil.which(b)), None)
    if browser is None:
        raise LpovodError(
            f"no browser found to show {report}. Install one of {', '.join(BROWSERS)}"
        )
    with atomic(page) as partial, tempfile.TemporaryDirectory() as profile:
        screenshot = Path(profile, "page.png")
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += [
            "--disable-background-networking",
            "--no-first-run",
            f"--user-data-dir={profile}",
        ]
        command += [f"--window-size={PAGE[0]},{PAGE[1]}", f"--screenshot={screenshot}"]
        subprocess.run([*command, report.resolve().as_uri()], check=True, capture_output=True)
        Image.open(screenshot).convert("P", palette=Image.Palette.ADAPTIVE).save(
            partial, "PNG", optimize=True
        )
