"""`lpovod learn`: a class more for a trained model, by its name or by examples.

Retrieval, features and the probe are those of the stages, and so is their store: the weights of the
new class are those that the workflow would train for the name in `classes.add_novel`. All novel
classes are trained together, as there, because what was retrieved for one is a negative of the
others; the weights of the others are then left as they were.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from lpovod.apps.export import MODEL, model_path
from lpovod.artifacts import check_made_from, fingerprint, sha256
from lpovod.clip import Clip
from lpovod.config import Config, slug
from lpovod.crops import crop_and_resize, crop_boxes
from lpovod.devices import device_of, own_device
from lpovod.exceptions import LpovodError, UsageError
from lpovod.formats.class_embeddings import ClassEmbeddings, read_text_embeddings
from lpovod.formats.coco import CocoDataset, corners, read_dataset
from lpovod.formats.image_features import ImageFeatures
from lpovod.formats.images import read_image
from lpovod.formats.index import RegionIndex, open_index
from lpovod.formats.model import ModelClass, ModelFile, read_model, write_model
from lpovod.formats.pseudo_labels import Retrieved, labels_of
from lpovod.formats.regions import (
    INDEX_BITS,
    RegionStore,
    open_shards,
    read_proposals,
    region_key,
    shards_in,
    split_key,
)
from lpovod.overlaps import overlapping
from lpovod.probe import fit, gather_candidates
from lpovod.progress import log
from lpovod.retrieval import retrieve_regions
from lpovod.retrieved_features import FrozenDetector, candidates_of, retrieved_features
from lpovod.search import as_annotation, check_belong, queries
from lpovod.source_digest import source_digest
from lpovod.text_tower import encode_names, load_model_clip

PROJECT = Path(__file__).parents[2]
"""Holds the stages' scripts, whose digests are in the keys of the store."""


@dataclass(frozen=True)
class Lesson:
    """What a class is learned from.

    Attributes:
        name: of the class.
        prompt: what CLIP reads in place of the name.
        examples: unit CLIP embeddings of pictures, (D,) each, to retrieve with.
        pictures: digests of their files.
        by_name: whether the name is part of the query.
        drop: keys of retrieved regions that do not show the class.
        keep: keys of regions that show it, whatever their rank.
    """

    name: str
    prompt: str | None = None
    examples: tuple[np.ndarray, ...] = ()
    pictures: tuple[str, ...] = ()
    by_name: bool = True
    drop: tuple[int, ...] = ()
    keep: tuple[int, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """What the model file records of the lesson."""
        return {
            "pictures": list(self.pictures),
            "by_name": self.by_name,
            "drop": [region_name(key) for key in sorted(self.drop)],
            "keep": [region_name(key) for key in sorted(self.keep)],
        }


def learn(
    name: Annotated[str, tyro.conf.Positional],
    run: Path,
    model: Path | None = None,
    output: Path | None = None,
    prompt: str | None = None,
    image: tuple[Path, ...] = (),
    images_only: bool = False,
    drop: tuple[str, ...] = (),
    keep: tuple[str, ...] = (),
    device: str = "cpu",
    threads: int = 2,
) -> None:
    """Add a class to a trained model; the weights of its other classes stay as they are.

    The run's training regions that are most similar to the name (or to example pictures) become
    pseudo-labels, and a linear probe is trained on them. A novel class that the model has already
    is learned anew.

    Args:
        name: of the class: "a unicycle"
        run: folder of the finished run that the model came from: results/mini
        model: the model file to add to; by default the run's own
        output: the file to write; by default --model is replaced
        prompt: what CLIP reads in place of the name
        image: pictures of the class, cut to it, to search with beside the name
        images_only: search with the pictures alone
        drop: retrieved regions that do not show the class: 1000162:7
        keep: regions that do show it, whatever their rank
        device: cpu or cuda
        threads: that compare the regions
    """
    if output is None and model is None:
        raise UsageError("the run's own model stays as it is: give --output FILE, or --model FILE")
    if images_only and not image:
        raise UsageError("--images-only needs pictures: --image crop.png")
    source = Run(run, own_device(device), threads)
    content = read_model(model_path(None, model) if model else run / MODEL)
    lesson = Lesson(
        name,
        prompt,
        tuple(source.embed_picture(path) for path in image),
        tuple(sha256(path) for path in image),
        not images_only,
        tuple(region_of(text) for text in drop),
        tuple(region_of(text) for text in keep),
    )
    draft = with_lesson(source, content, lesson)
    retrieved = source.retrieve(draft)
    learned = with_probe(source, draft, name, retrieved)
    _print(name, retrieved[name])
    path = output or model
    assert path is not None
    write_model(path, learned)
    log.info(f"{name!r}: {len(learned.classes)} classes in {path}")


class Run:
    """A finished run, from whose training regions classes are learned; its files are kept open.

    Args:
        folder: of the run.
        device: where the networks run.
        threads: that compare the regions.

    Raises:
        LpovodError: if the run has no model or no index.
    """

    def __init__(self, folder: Path, device: str = "cpu", threads: int = 2):
        self.folder, self.device, self.threads = folder, device_of(device), threads
        self.model = read_model(model_path(folder, None))
        if self.config.pseudo_labels.file or self.config.linear_probe.checkpoint:
            raise LpovodError(
                f"{folder}: its novel classes come from an imported file, and not from retrieval: "
                "no class can be learned beside them"
            )
        index = folder / "region_index/train.index"
        if not index.is_file():
            raise LpovodError(
                f"{index}: no such file. Make it first: snakemake --cores all {index}"
            )
        self.detector = FrozenDetector(
            folder / "base_detector/detector.safetensors",
            self.config.backbone,
            self.config.base_detector,
            self.config.region_features,
            self.device,
        )
        check_made_from(folder / MODEL, self.model.identity, "detector", self.detector.digest)

    @property
    def config(self) -> Config:
        """The configuration of the run."""
        return self.model.config

    @cached_property
    def data(self) -> CocoDataset:
        """The training images."""
        return read_dataset(self.folder / "dataset/train.images.json")

    @cached_property
    def proposals(self) -> RegionStore:
        """Their proposals."""
        shards = shards_in(self.folder / "proposals/train")
        return read_proposals(shards, self.data.path)

    @cached_property
    def regions(self) -> RegionStore:
        """CLIP's embeddings of the proposals."""
        stage = "region_embeddings"
        return open_shards(shards_in(self.folder / stage / "train"), stage)

    @cached_property
    def index(self) -> RegionIndex:
        """The index over them.

        Raises:
            LpovodError: if it, the regions, the images and CLIP do not belong together.
        """
        index = open_index(self.folder / "region_index/train.index")
        check_belong([self._base], self.regions, index, self.data.path)
        return index

    @property
    def base_text(self) -> np.ndarray:
        """(b, D) text embeddings of the base classes."""
        return self._base.vectors

    @cached_property
    def _base(self) -> ClassEmbeddings:
        return read_text_embeddings(self.folder / "text_embeddings/base.safetensors")

    @property
    def clip(self) -> Clip:
        """The run's CLIP."""
        return load_model_clip(self.model, self.device)

    def embed_picture(self, path: Path) -> np.ndarray:
        """CLIP's unit embedding, (D,) float32, of a whole picture, cropped as regions are."""
        return self.embed_pixels(read_image(path))

    def embed_pixels(self, pixels: np.ndarray) -> np.ndarray:
        """The same of a decoded picture, (height, width, 3) uint8 RGB."""
        height, width = pixels.shape[:2]
        whole = np.array([[0, 0, width, height]], np.float32)
        shape = self.clip.preprocessing
        features = [
            self.clip.encode_crops(
                crop_and_resize(
                    pixels,
                    crop_boxes(whole, scale, width, height),
                    shape.image_size,
                    self.device,
                    shape.interpolation,
                    shape.resize_mode,
                )
            )
            for scale in self.config.region_embeddings.scales
        ]
        return _unit(np.sum([f.cpu().numpy()[0] for f in features], axis=0)).astype(np.float32)

    def retrieve(self, content: ModelFile) -> dict[str, Retrieved]:
        """The regions of each novel class of a model, corrected as its lessons say."""
        order = dict.fromkeys([*self.config.classes.novel, *content.of_split("novel")])
        vectors = {name: self.query(content, name) for name in order}
        retrieved = retrieve_regions(
            vectors,
            self.index,
            self.regions,
            self.config.pseudo_labels,
            self.folder / "store/pseudo_labels",
            _code("pseudo_labels"),
            self.threads,
        )
        lessons = {c.name: c.learned for c in content.classes if c.learned}
        return {
            name: self.corrected(of_class, vectors[name], lessons[name])
            if name in lessons
            else of_class
            for name, of_class in retrieved.items()
        }

    def query(self, content: ModelFile, name: str) -> np.ndarray:
        """The unit vector, (D,) float32, that the regions of a class are retrieved with."""
        if name in content.queries:
            return content.queries[name]
        return queries(content.text[name][None], self.base_text, self.config.pseudo_labels)[0]

    def corrected(
        self, retrieved: Retrieved, vector: np.ndarray, lesson: dict[str, Any]
    ) -> Retrieved:
        """What was retrieved for a class, without what a person dropped and with what they kept.

        A dropped region is a negative of the class, so it is not among the ignored ones either; its
        image stays among the images to learn from.
        """
        drop = {region_of(text) for text in lesson["drop"]}
        keep = [region_of(text) for text in lesson["keep"]]
        known = {region["key"] for region in retrieved.regions}
        regions = [r for r in retrieved.regions if r["key"] not in drop]
        regions += [self.region(key, vector) for key in keep if key not in known]
        dropped = [self.region(key, vector) for key in drop]
        ignored = [r for r in retrieved.ignored if not _on_any(r, dropped)]
        return Retrieved(regions, ignored, retrieved.recall)

    def region(self, key: int, vector: np.ndarray) -> dict[str, Any]:
        """A region in COCO's annotation, with its cosine with a vector.

        Raises:
            LpovodError: if the run has no such region.
        """
        image_id, place = (int(part) for part in split_key(np.array(key)))
        if image_id not in self.regions or place >= self.regions.count(image_id):
            raise LpovodError(f"{region_name(key)}: {self.folder} has no such training region")
        of_image = self.regions.read(image_id, ["embedding"])
        cosine = of_image["embedding"][place].astype(np.float64) @ vector
        return as_annotation(key, of_image.box[place], of_image.objectness[place], cosine)


def learn_class(run: Run, content: ModelFile, lesson: Lesson) -> ModelFile:
    """A model with a class more, or with one of its novel classes learned anew.

    A pure function of the run, the model and the lesson.

    Args:
        run: that the model came from.
        content: of the model file.
        lesson: what the class is learned from.

    Raises:
        UsageError: if the class is a base class.
        LpovodError: if the model comes from another run, or nothing is retrieved.
    """
    draft = with_lesson(run, content, lesson)
    return with_probe(run, draft, lesson.name, run.retrieve(draft))


def with_lesson(run: Run, content: ModelFile, lesson: Lesson) -> ModelFile:
    """A model with the class of a lesson, whose linear classifier is not trained yet."""
    _check_lesson(run, content, lesson)
    known, text = content.class_of(lesson.name), None
    if lesson.prompt is None:  # the model's, or the configuration's
        prompt = known.prompt if known else run.config.classes.prompts.get(lesson.name)
        lesson = replace(lesson, prompt=prompt)
    if lesson.by_name:
        prompts = {lesson.name: lesson.prompt} if lesson.prompt else {}
        if known and known.prompt == lesson.prompt and lesson.name in content.text:
            text = content.text[lesson.name]
        else:
            (text,) = encode_names([lesson.name], content, prompts)
    return content.with_class(_as_class(content, lesson), text, _query(run, lesson, text))


def with_probe(
    run: Run, content: ModelFile, name: str, retrieved: dict[str, Retrieved]
) -> ModelFile:
    """A model with the linear classifier of one class trained on what all of them retrieved."""
    if not retrieved[name].regions:
        raise LpovodError(f"{name!r}: no region is left to learn from")
    weights = train(run, content, retrieved)
    return replace(content, weights=content.weights | {name: weights[name]})


def train(run: Run, content: ModelFile, retrieved: dict[str, Retrieved]) -> dict[str, np.ndarray]:
    """Weights of all novel classes, (dimension,) float32, from their retrieved regions."""
    labels, ignored = labels_of(retrieved)
    for name, lesson in ((c.name, c.learned) for c in content.classes if c.learned):
        for text in lesson["drop"]:
            image_id = int(split_key(np.array(region_of(text)))[0])
            nothing = np.empty((0, 4), np.float32), np.empty(0, np.float32)
            labels[name].setdefault(image_id, nothing)
    image_ids = sorted({i for images in labels.values() for i in images})
    wanted = {i: candidates_of(run.proposals.read(i), labels, i) for i in image_ids}
    paths = retrieved_features(
        run.data,
        wanted,
        run.detector,
        run.folder / "store/region_features",
        _code("region_features"),
    )
    candidates = gather_candidates(labels, ignored, ImageFeatures(paths))
    settings = run.config.linear_probe
    weights = fit(list(candidates.values()), len(labels), settings, run.config.seed)
    return dict(zip(labels, weights, strict=True))


def region_name(key: int) -> str:
    """A region as people name it: id of its image, and its place among the image's regions."""
    image_id, place = split_key(np.array(key))
    return f"{image_id}:{place}"


def region_of(text: str) -> int:
    """The key of a region from its name.

    Raises:
        UsageError: if the text is no such name.
    """
    image_id, _, place = text.partition(":")
    if not (image_id.isdecimal() and place.isdecimal() and int(place) < 1 << INDEX_BITS):
        raise UsageError(f"region {text!r}: expected image:place, as in the table: 1000162:7")
    return int(region_key(np.array(int(image_id)), np.array(int(place))))


def _check_lesson(run: Run, content: ModelFile, lesson: Lesson) -> None:
    if content.identity != run.model.identity:
        raise LpovodError(f"the model comes from another run than {run.folder}")
    if not lesson.name.strip():
        raise UsageError("the class needs a name")
    if lesson.name in content.of_split("base"):
        raise UsageError(f"{lesson.name!r} is a base class, whose weights come from its boxes")
    for known in content.names:
        if slug(known) == slug(lesson.name) and known != lesson.name:
            raise UsageError(f"the model has {known!r}, which differs from {lesson.name!r} in form")


def _query(run: Run, lesson: Lesson, text: np.ndarray | None) -> np.ndarray:
    """The name's query, the pictures' mean, or the direction between both."""
    parts = []
    if text is not None:
        parts.append(queries(text[None], run.base_text, run.config.pseudo_labels)[0])
    if lesson.examples:
        parts.append(_unit(np.mean(lesson.examples, axis=0)))
    query = parts[0] if len(parts) == 1 else _unit(np.sum(parts, axis=0))
    return query.astype(np.float32)


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


def _as_class(content: ModelFile, lesson: Lesson) -> ModelClass:
    known = content.class_of(lesson.name)
    known = known or ModelClass(lesson.name, "novel", content.id_of(lesson.name))
    record = lesson.as_json() | {"run": fingerprint(content.identity)}
    return replace(known, prompt=lesson.prompt, learned=record)


def _on_any(region: dict[str, Any], others: Sequence[dict[str, Any]]) -> bool:
    boxes = corners([o["bbox"] for o in others if o["image_id"] == region["image_id"]])
    return bool(overlapping(corners([region["bbox"]]), boxes)[0])


def _code(stage: str) -> str:
    return source_digest(Path("workflow_scripts", f"{stage}.py"), PROJECT)


def _print(name: str, retrieved: Retrieved) -> None:
    print(f"{name}: {len(retrieved.regions)} regions\n{'region':>16}  objectness  cosine")
    for region in retrieved.regions:
        text = region_name(region["key"])
        print(f"{text:>16}  {region['score']:10.3f}  {region['cosine']:6.4f}")
