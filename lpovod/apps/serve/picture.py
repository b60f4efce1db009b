"""The picture of the page in docs/: a walk of a person who sees which regions are wrong.

The annotations that no stage learns from say which. Needs playwright and Chromium.

python -m lpovod.apps.serve.picture --run results/mini --output docs/pictures/serve.png
"""

import shutil
import socket
import threading
import time
from pathlib import Path
from typing import Any

import uvicorn
from PIL import Image

from lpovod.apps.learn import region_name
from lpovod.apps.serve.app import build_app
from lpovod.apps.serve.workshop import Workshop
from lpovod.artifacts import atomic
from lpovod.command_line import run as run_program
from lpovod.exceptions import LpovodError
from lpovod.formats.coco import corners, read_dataset
from lpovod.overlaps import overlaps

WIDTH, HEIGHT = 1400, 900


def picture(run: Path, output: Path, example: int = 0, name: str = "fish") -> None:
    """Photograph the page after a correction.

    Args:
        run: folder of a finished run
        output: png
        example: place of the example image to open, from 0
        name: of the class to correct
    """
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        raise LpovodError("no browser: install chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        raise LpovodError("playwright is not installed: pip install -e .[test]") from None
    workshop = Workshop(run, None)
    wrong = wrong_regions(workshop, name)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(build_app(workshop), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        with sync_playwright() as started, atomic(output) as partial:
            browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            tab = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
            tab.goto(f"http://127.0.0.1:{listener.getsockname()[1]}")
            _walk(tab, example, name, wrong)
            partial.write_bytes(tab.screenshot())
            browser.close()
            photograph = Image.open(partial).convert("RGB")
            photograph.quantize(256).save(partial, "PNG", optimize=True)
    finally:
        server.should_exit = True
        thread.join()


def wrong_regions(workshop: Workshop, name: str) -> list[str]:
    """The regions that a class retrieved and that overlap none of its objects by half."""
    run = workshop.run
    assert run is not None
    truth = read_dataset(run.folder / "dataset/train_all_classes.json")
    (category,) = truth.category_ids([name])
    wrong = []
    for region in run.retrieve(run.model)[name].regions:
        boxes, categories = truth.boxes(region["image_id"])
        iou = overlaps(corners(region["bbox"]), boxes)[0]
        if iou[categories == category].max(initial=0) < 0.5:
            wrong.append(region_name(region["key"]))
    return wrong


def _walk(tab: Any, example: int, name: str, wrong: list[str]) -> None:
    idle = "body[data-ready]:not([aria-busy])"
    tab.wait_for_selector(idle)
    tab.click(f"#examples .thumb >> nth={example}")
    tab.wait_for_selector("#boxes .frame", state="attached")
    tab.click(f"#classes .name:text-is('{name}')")
    tab.wait_for_selector(".region")
    while tab.is_visible("#more"):
        tab.click("#more")
    for region in wrong:
        tab.click(f".region[data-region='{region}']")
    tab.wait_for_selector(idle)
    tab.click("#correct")
    tab.wait_for_selector("#undo:not(:disabled)")
    tab.wait_for_selector(idle)
    tab.evaluate("scrollTo(0, 0)")
    time.sleep(1)  # pictures of regions load while they are shown


if __name__ == "__main__":
    run_program(picture)
