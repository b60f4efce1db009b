"""What the pages share, and what each page has for itself; knows nothing of HTTP.

Everything here is called on one thread, so detection and learning never run at once.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from lpovod.apps.export import model_path
from lpovod.apps.learn import Lesson, Run, learn_class, region_name, region_of
from lpovod.apps.serve.uploads import SHOWN, as_jpeg, read_upload
from lpovod.config import slug
from lpovod.drawing import choose_images, square_around
from lpovod.exceptions import LpovodError
from lpovod.formats.coco import CocoDataset, read_dataset
from lpovod.formats.model import ModelClass, ModelFile, read_model
from lpovod.formats.regions import Regions, split_key
from lpovod.model import Model

EXAMPLES = 8  # images of the validation split to try
EXAMPLE_SIDE, CROP_SIDE = 240, 160  # longest sides in pixels
IMAGES, STATES, PICTURES, WORDS = 8, 20, 32, 50  # the most that a page has
NAME_LENGTH, PROMPT_LENGTH = 100, 200
LOWEST = 0.05
"""Lowest threshold of a page, unless the run's own is lower."""

NO_RUN = (
    "Only a model file is open: the training regions to learn from are in its run. Start again "
    "with the run: lpovod serve --run results/NAME"
)


class Workshop:
    """The model and the run that all pages start from; nothing here changes.

    Args:
        run: folder of a finished run; None if classes are not learned.
        model: a model file; None for the run's.
        device: "cpu" or "cuda"; None for the GPU if there is one.

    Raises:
        LpovodError: if a file is missing, or the model comes from another run.
    """

    def __init__(self, run: Path | None, model: Path | None, device: str | None = None):
        path = model or model_path(run, None)
        self.model = Model(read_model(path), path, device)
        self.run = Run(run, self.model.device) if run is not None else None
        if self.run and self.run.model.identity != self.model.content.identity:
            raise LpovodError(f"{model} comes from another run than {run}")
        self.title = str(run or path)
        self._val = self._validation_images()
        config = self.model.content.config.classes
        self.examples = (
            choose_images(self._val, config.base, config.novel, EXAMPLES) if self._val else []
        )

    def warm_up(self) -> None:
        """Open what the first lesson needs."""
        if self.run is not None:
            _ = self.run.data, self.run.proposals, self.run.regions, self.run.index
            _ = self.run.base_text

    def example(self, image_id: int) -> tuple[str, np.ndarray]:
        """File name and pixels of an example image.

        Raises:
            LpovodError: if it is none of the examples.
        """
        if self._val is None or image_id not in self.examples:
            raise LpovodError("there is no such example image")
        return Path(self._val.images[image_id]["file_name"]).name, self._val.load(image_id)

    @lru_cache(maxsize=EXAMPLES)  # noqa: B019 there is one workshop
    def thumbnail(self, image_id: int) -> bytes:
        """A small JPEG of an example image."""
        return as_jpeg(Image.fromarray(self.example(image_id)[1]), EXAMPLE_SIDE)

    def crop(self, name: str) -> bytes:
        """A JPEG of a training region with what surrounds it.

        Raises:
            LpovodError: if there is no run, or it has no such region.
        """
        if self.run is None:
            raise LpovodError(NO_RUN)
        nothing = np.zeros_like(next(iter(self.model.content.text.values())))
        region = self.run.region(region_of(name), nothing)
        square, box = square_around(self.run.data.load(region["image_id"]), region["bbox"])
        return as_jpeg(_outlined(square, box), CROP_SIDE, 84)

    def _validation_images(self) -> CocoDataset | None:
        if self.run is None:
            return None
        path = self.run.folder / "dataset/val.json"
        classes = self.run.config.classes
        if not path.is_file():  # a run need not have a validation split
            return None
        return read_dataset(path).of_classes(classes.base, classes.novel)


@dataclass(frozen=True)
class Opened:
    """An image of a page.

    Attributes:
        image_id: counted from 1.
        name: of the file.
        size: width and height in pixels.
        regions: with what the detector says of them.
        jpeg: the image as the page shows it.
    """

    image_id: int
    name: str
    size: tuple[int, int]
    regions: Regions
    jpeg: bytes


@dataclass(frozen=True)
class State:
    """A model that a page had.

    Attributes:
        model: with its vocabulary.
        change: that led to it, in words.
        lessons: of the classes that this page learned.
    """

    model: Model
    change: str = ""
    lessons: dict[str, Lesson] = field(default_factory=dict)


class Session:
    """The images, the model and the corrections of one page."""

    def __init__(self, workshop: Workshop):
        self._shop = workshop
        self._states, self._place = [State(workshop.model)], 0
        self._images: OrderedDict[int, Opened] = OrderedDict()
        self._pictures: OrderedDict[str, np.ndarray] = OrderedDict()
        self._count = 0

    @property
    def model(self) -> Model:
        """The page's model."""
        return self._state.model

    @property
    def content(self) -> ModelFile:
        """What its model file holds."""
        return self.model.content

    # --- images

    def open_upload(self, content: bytes, name: str) -> Opened:
        """Open an image file that the page sent."""
        return self._open(name, read_upload(content, name))

    def open_example(self, image_id: int) -> Opened:
        """Open an image of the validation split."""
        return self._open(*self._shop.example(image_id))

    def image(self, image_id: int) -> Opened:
        """An image that the page opened.

        Raises:
            LpovodError: if it is no longer there: a page has its last `IMAGES` images.
        """
        if image_id not in self._images:
            raise LpovodError(f"the server has only the last {IMAGES} images. Open this one again")
        return self._images[image_id]

    def close(self, image_id: int) -> None:
        """Forget an image."""
        self._images.pop(image_id, None)

    def _open(self, name: str, pixels: np.ndarray) -> Opened:
        height, width = pixels.shape[:2]
        (regions,) = self.model.describe([self.model.view(pixels)], [(height, width)])
        self._count += 1
        jpeg = as_jpeg(Image.fromarray(pixels), SHOWN)
        opened = Opened(self._count, name, (width, height), regions, jpeg)
        self._images[opened.image_id] = opened
        while len(self._images) > IMAGES:
            self._images.popitem(last=False)
        return opened

    # --- detections

    def detections(self, image_id: int) -> dict[str, Any]:
        """All that the page may show of an image, with refined boxes and without.

        The page itself applies threshold, classes and the limit of detections: NMS runs within a
        class, and a detection suppresses none with a higher score.
        """
        regions = self.image(image_id).regions
        return {
            "image": image_id,
            "names": self.model.vocabulary,
            "refined": self._rows(regions, refined=True),
            "proposed": self._rows(regions, refined=False),
        }

    def results(
        self, threshold: float, classes: Sequence[str] | None, refined: bool
    ) -> list[dict[str, Any]]:
        """Detections in all open images, as `lpovod detect` writes them.

        Raises:
            LpovodError: if a class is unknown.
        """
        if unknown := [name for name in classes or () if name not in self.model.vocabulary]:
            raise LpovodError(f"there is no class {unknown[0]!r}")
        return [
            entry | {"file_name": image.name}
            for image in self._images.values()
            for entry in self.model.score(image.regions, threshold, classes, refined).to_coco(
                image.image_id
            )
        ]

    def _rows(self, regions: Regions, refined: bool) -> dict[str, list]:
        """Box in hundredths of a pixel, score and place of the class of each detection."""
        # The page may show the best per_image detections of any selection of classes.
        every = max(1, len(regions.box) * len(self.model.vocabulary))
        detected = self.model.score(regions, self.floor, None, refined, every)
        places = {name: place for place, name in enumerate(self.model.vocabulary)}
        classes = np.array([places[name] for name in detected.class_name], int)
        rows = _best_of_each(classes, self.content.config.evaluation.per_image)
        return {
            "box": np.round(detected.xyxy[rows].astype(float), 2).tolist(),
            "score": detected.confidence[rows].tolist(),
            "class": classes[rows].tolist(),
        }

    @property
    def floor(self) -> float:
        """The lowest threshold."""
        return min(LOWEST, self.content.config.evaluation.score_threshold)

    # --- classes

    def overview(self) -> dict[str, Any]:
        """Classes, limits, and what can be undone."""
        settings = self.content.config.evaluation
        known = [_class_row(c) for c in self.content.classes]
        words = [{"name": word, "split": "word", "dropped": 0} for word in self.words]
        later = self._states[self._place + 1 :]
        return {
            "classes": known + words,
            "floor": self.floor,
            "per_image": settings.per_image,
            "undo": self._state.change if self._place else None,
            "redo": later[0].change if later else None,
        }

    @property
    def words(self) -> list[str]:
        """The words that the CLIP head alone scores."""
        return self.model.vocabulary[len(self.content.names) :]

    def set_words(self, words: Sequence[str]) -> None:
        """Choose the words that are scored by the CLIP head alone.

        Raises:
            LpovodError: if there are too many, or no CLIP embeds them.
        """
        wanted = [w for w in dict.fromkeys(map(checked_name, words)) if w not in self.content.names]
        if len(wanted) > WORDS:
            raise LpovodError(f"{len(wanted)} words; at most {WORDS} are scored at once")
        for word in wanted:
            self._check_form(word)
        if wanted == self.words:
            return
        model = self.model.with_content(self.content, [w for w in wanted if w in self.words])
        new = [w for w in wanted if w not in self.words]
        model.add_names(new)
        change = f"add {', '.join(new)}" if new else "remove a word"
        self._push(State(model, change, self._state.lessons))

    def regions(self, name: str) -> list[dict[str, Any]]:
        """The regions that a class was learned from, and those that were dropped; best first.

        Raises:
            LpovodError: if nothing was retrieved for the class, with the reason.
        """
        known = self.content.class_of(name)
        if known is None:
            raise LpovodError(
                f"{name!r} has no linear probe: CLIP's head alone scores it. Learn it to see what "
                "it retrieves"
            )
        if known.split == "base":
            raise LpovodError(
                f"{name!r} is a base class: the detector learned it from annotated boxes, so "
                "nothing was retrieved"
            )
        run = self._run()
        vector = run.query(self.content, name)
        drop = [region_of(text) for text in (known.learned or {}).get("drop", ())]
        rows = [(region, False) for region in run.retrieve(self.content)[name].regions]
        rows += [(run.region(key, vector), True) for key in drop]
        rows.sort(key=lambda row: -row[0]["cosine"])
        return [
            {
                "region": region_name(region["key"]),
                "image": int(split_key(np.array(region["key"]))[0]),
                "cosine": region["cosine"],
                "objectness": region["score"],
                "dropped": dropped,
            }
            for region, dropped in rows
        ]

    # --- learning

    def add_picture(self, content: bytes, name: str) -> str:
        """Embed an example picture; return the key that `learn` takes."""
        run = self._run()
        key = hashlib.sha256(content).hexdigest()
        self._pictures[key] = run.embed_pixels(read_upload(content, name))
        while len(self._pictures) > PICTURES:
            self._pictures.popitem(last=False)
        return key

    def learn(
        self,
        name: str,
        prompt: str = "",
        pictures: Sequence[str] = (),
        by_name: bool = True,
    ) -> None:
        """Learn a class by its name, by pictures or by both.

        Raises:
            LpovodError: if the name cannot be a class, a picture is missing, or nothing is
                retrieved.
        """
        name = checked_name(name)
        text = checked_text(prompt, "prompt", PROMPT_LENGTH) if prompt.strip() else None
        if absent := [key for key in pictures if key not in self._pictures]:
            raise LpovodError(f"{len(absent)} of the pictures are no longer there. Add them again")
        if not (by_name or pictures):
            raise LpovodError("without its name, a class needs pictures")
        self._check_form(name)
        vectors = tuple(self._pictures[key] for key in pictures)
        self._learn(Lesson(name, text, vectors, tuple(pictures), by_name))

    def correct(self, name: str, drop: Sequence[str]) -> None:
        """Learn a class again without some of its regions.

        Raises:
            LpovodError: if it is no novel class, or no region is left.
        """
        known = self.content.class_of(name)
        if known is None or known.split == "base":
            raise LpovodError(f"{name!r} is no novel class")
        lesson = self._state.lessons.get(name) or _lesson_of(known)
        self._learn(replace(lesson, drop=tuple(sorted({region_of(text) for text in drop}))))

    def move(self, step: int) -> None:
        """Undo (-1) or redo (+1).

        Raises:
            LpovodError: if there is nothing to undo or redo.
        """
        if not 0 <= self._place + step < len(self._states):
            raise LpovodError(f"there is nothing to {'undo' if step < 0 else 'redo'}")
        self._place += step

    def _learn(self, lesson: Lesson) -> None:
        run, state = self._run(), self._state
        known = self.content.class_of(lesson.name)
        content = learn_class(run, self.content, lesson)
        words = [word for word in self.words if word != lesson.name]
        change = f"{'correct' if lesson.drop else 'learn'} {lesson.name}"
        if known is not None and not lesson.drop:
            change = f"learn {lesson.name} again"
        lessons = state.lessons | {lesson.name: lesson}
        self._push(State(state.model.with_content(content, words), change, lessons))

    def _run(self) -> Run:
        if self._shop.run is None:
            raise LpovodError(NO_RUN)
        return self._shop.run

    def _check_form(self, name: str) -> None:
        for known in self.model.vocabulary:
            if slug(known) == slug(name) and known != name:
                raise LpovodError(f"there is a class {known!r} already, which differs in form only")

    @property
    def _state(self) -> State:
        return self._states[self._place]

    def _push(self, state: State) -> None:
        self._states = [*self._states[: self._place + 1], state][-STATES:]
        self._place = len(self._states) - 1


def checked_text(text: str, meaning: str, most: int) -> str:
    """A text without spaces around it.

    Raises:
        LpovodError: if it is empty, too long or not printable.
    """
    text = text.strip()
    if not text:
        raise LpovodError(f"the {meaning} is empty")
    if len(text) > most:
        raise LpovodError(f"the {meaning} has {len(text)} letters; at most {most} are allowed")
    if not text.isprintable():
        raise LpovodError(f"the {meaning} has letters that cannot be printed")
    return text


def checked_name(name: str) -> str:
    """A class name as a person typed it; raises as `checked_text` does."""
    return checked_text(name, "name of the class", NAME_LENGTH)


def _outlined(square: Image.Image, box: tuple[float, float, float, float]) -> Image.Image:
    """A square of `CROP_SIDE` pixels with a box, xywh in percent."""
    drawn = square.resize((CROP_SIDE, CROP_SIDE), Image.Resampling.BICUBIC)
    x, y, width, height = (CROP_SIDE * side / 100 for side in box)
    pen = ImageDraw.Draw(drawn)
    for outline, margin, line in (((40, 40, 40), 1, 4), ((255, 255, 255), 0, 2)):
        corners = (x - margin, y - margin, x + width + margin, y + height + margin)
        pen.rectangle(corners, outline=outline, width=line)
    return drawn


def _best_of_each(classes: np.ndarray, count: int) -> np.ndarray:
    """Rows of the first `count` of each class, in their order."""
    rows = [np.flatnonzero(classes == c)[:count] for c in np.unique(classes)]
    return np.sort(np.concatenate(rows)) if rows else np.empty(0, int)


def _class_row(of_class: ModelClass) -> dict[str, Any]:
    return {
        "name": of_class.name,
        "split": of_class.split,
        "prompt": of_class.prompt,
        "dropped": len((of_class.learned or {}).get("drop", ())),
    }


def _lesson_of(of_class: ModelClass) -> Lesson:
    """How a class was learned that this page did not learn."""
    learned = of_class.learned or {}
    if learned.get("pictures"):
        raise LpovodError(
            f"{of_class.name!r} was learned from pictures, which the model file does not hold. "
            "Learn it again with them"
        )
    keep = tuple(region_of(text) for text in learned.get("keep", ()))
    return Lesson(of_class.name, of_class.prompt, keep=keep)
