"""Time of each step on the page of `lpovod serve`, from the request to the new detections.

Run as ``python -m benchmarks.serve results/mini`` after the workflow. Everything runs in this
process, without a network; the page itself adds a few milliseconds. The lessons add to the run's
store, so that a second run of this program finds the new class's images there. Ends with one JSON
line: seconds, the median of five lessons for corrections, and their processor time.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated

import tyro

from lpovod.apps.serve.picture import wrong_regions
from lpovod.apps.serve.workshop import Session, Workshop

REPEATS = 5


def serve(run: Annotated[Path, tyro.conf.Positional], name: str = "fish", new: str = "cup") -> None:
    """Time the steps.

    Args:
        run: folder of a finished run
        name: of a novel class to correct: its wrong regions are dropped, one more each time
        new: of a class to learn
    """
    took: dict[str, float] = {}
    workshop = timed(took, "start", lambda: Workshop(run, None))
    workshop.warm_up()
    session = Session(workshop)
    image = workshop.examples[0]
    session.open_example(image)
    opened = timed(took, "open an image", lambda: session.open_example(image)).image_id
    timed(took, "why: the list of regions", lambda: session.regions(name))
    wrong = wrong_regions(workshop, name)
    timed(took, "first correction", lambda: correct(session, name, wrong, opened))
    lessons: dict[str, float] = {}
    start = time.process_time()
    for number in range(1, REPEATS + 1):
        drop = wrong[: len(wrong) - number]
        timed(lessons, str(number), lambda drop=drop: correct(session, name, drop, opened))
    took["processor time of a correction"] = (time.process_time() - start) / REPEATS
    took["correction"] = median(lessons.values())
    took["slowest correction"] = max(lessons.values())
    timed(took, "undo", lambda: (session.move(-1), session.detections(opened)))
    timed(took, "new class", lambda: (session.learn(new), session.detections(opened)))
    print(json.dumps({step: round(seconds, 3) for step, seconds in took.items()}))


def correct(session: Session, name: str, drop: list[str], image: int) -> None:
    """What pressing Learn does."""
    session.correct(name, drop)
    session.detections(image)


def timed(took: dict[str, float], step: str, function: Callable):
    """Call a function and record its seconds."""
    start = time.perf_counter()
    result = function()
    took[step] = time.perf_counter() - start
    return result


if __name__ == "__main__":
    tyro.cli(serve)
