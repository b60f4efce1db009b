"""What a change of the classes costs, and that it gives what a run from scratch gives.

The stages from class names to the probe run on a drawn world; the work they do is counted.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_proposals, write_shards
from counting import count
from PIL import Image

import lpovod.retrieval
import lpovod.stages.linear_probe
from lpovod.artifacts import identity, read_json, sha256, write_tensors
from lpovod.clip import Clip
from lpovod.config import (
    BackboneSettings,
    BaseDetectorSettings,
    ClassSettings,
    ClipSettings,
    LinearProbeSettings,
    PseudoLabelsSettings,
    RegionFeaturesSettings,
    RegionIndexSettings,
    TextEmbeddingsSettings,
)
from lpovod.formats.index import RegionIndex
from lpovod.networks.detector import Detector
from lpovod.stages.linear_probe import train_linear_probe
from lpovod.stages.pseudo_labels import retrieve
from lpovod.stages.region_features import extract_retrieved
from lpovod.stages.region_index import build_region_index
from lpovod.stages.text_embeddings import embed_classes

SIZES = [(80, 60), (60, 80)]
REGIONS = {n: 3 + n % 4 for n in (5, 900, 31, 7, 12, 3, 41, 20, 66, 8, 50, 77, 2, 35, 19)}
BACKBONE = BackboneSettings(channels=16, short_side=96, long_side=128)
HEADS = BaseDetectorSettings(
    regions="proposals", head_convolutions=1, dimension=24, finest_scale=16, sampling_ratio=1
)
TEMPLATES = TextEmbeddingsSettings(templates=["{}", "a photo of a {}"])
BASE, NOVEL = ["dog", "cat"], ["bus", "fish", "traffic light"]
RETRIEVAL = PseudoLabelsSettings(k=4, objectness=0.2)
NOTHING = {"names": 0, "queries": 0, "rows": 0, "images": 0}


@dataclass
class Work:
    """Counts since the last look: names embedded, classes searched, index rows, images, probes."""

    calls: dict[str, list[int]]

    def done(self) -> dict[str, int]:
        counts = {name: sum(calls) for name, calls in self.calls.items()}
        for calls in self.calls.values():
            calls.clear()
        return counts


@pytest.fixture()
def work(monkeypatch) -> Work:
    def distinct(model: Detector, images: torch.Tensor) -> int:
        # A last batch is filled up with images of one colour.
        drawn = (images != images[:, :, :1, :1]).flatten(1).any(dim=1)
        return len(torch.unique(images[drawn].flatten(1), dim=0))

    return Work(
        {
            "names": count(monkeypatch, Clip, "encode_texts"),
            "queries": count(
                monkeypatch,
                lpovod.retrieval,
                "top_regions",
                lambda i, r, vectors, s: len(vectors),
            ),
            "rows": count(monkeypatch, RegionIndex, "stream", lambda index, mask: int(mask.sum())),
            "images": count(monkeypatch, Detector, "pyramid", distinct),
            "probes": count(
                monkeypatch, lpovod.stages.linear_probe, "fit", lambda images, classes, *_: classes
            ),
        }
    )


@dataclass
class Project:
    """What the stages read, and their outputs in a new folder for each run."""

    folder: Path
    clip: ClipSettings
    objectness: np.ndarray
    runs: list[Path] = field(default_factory=list)

    def run(
        self,
        novel: list,
        settings: PseudoLabelsSettings = RETRIEVAL,
        detector: str = "detector",
        code: str = "c",
        store: str = "store",
        prompts: dict[str, str] | None = None,
    ) -> dict[str, str]:
        """Digest of each declared output, by its path."""
        given, output = self.folder, self.folder / f"run{len(self.runs)}"
        self.runs.append(output)
        stored = [(given / store / stage, code) for stage in ("text", "labels", "features")]
        texts = [output / "base.safetensors", output / "novel.safetensors"]
        classes = ClassSettings(base=BASE, novel=novel, prompts=prompts or {})
        embed_classes(classes, self.clip, TEMPLATES, *texts, *stored[0])
        dataset, labels = given / "train.json", output / "novel.json"
        shards = [given / "0.h5", given / "1.h5"]
        retrieve(
            *(classes.novel, texts[1], texts[0], given / "index", shards, dataset, settings),
            *(labels, *stored[1]),
        )
        extract_retrieved(
            *(dataset, [given / "proposals.h5"], labels, given / detector, BACKBONE, HEADS),
            *(RegionFeaturesSettings(batch_size=4), 0, 1, output / "retrieved", *stored[2]),
        )
        probe = LinearProbeSettings(epochs=3, milestones=[2], learning_rate=0.05)
        train_linear_probe(labels, [output / "retrieved"], probe, 0, output / "probe")
        files = (path for path in sorted(output.rglob("*")) if path.is_file())
        return {str(path.relative_to(output)): sha256(path) for path in files}

    def images(self, *names: str, run: int = -1) -> set[int]:
        """Images that classes retrieved in a run; all classes without a name."""
        content = read_json(self.runs[run] / "novel.json")
        ids = {c["id"] for c in content["categories"] if not names or c["name"] in names}
        return {a["image_id"] for a in content["annotations"] if a["category_id"] in ids}

    def rows(self, floor: float = 0.2) -> int:
        """Regions that one pass over the index reads."""
        return int((self.objectness >= np.float32(floor)).sum())


@pytest.fixture()
def project(tmp_path, tiny_clip) -> Project:
    random = np.random.default_rng(198)
    images, boxes, objectness, vectors = [], {}, {}, {}
    (tmp_path / "images/train").mkdir(parents=True)
    for place, (image_id, regions) in enumerate(REGIONS.items()):
        width, height = SIZES[place % 3 == 1]
        pixels = random.integers(0, 256, (height, width, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"images/train/{image_id}.png")
        images.append({"id": image_id, "file_name": f"{image_id}.png"})
        images[-1] |= {"width": width, "height": height}
        low = random.uniform(0, 30, (regions, 2))
        high = low + random.uniform(8, 28, (regions, 2))
        boxes[image_id] = np.hstack([low, high]).astype(np.float32)
        objectness[image_id] = random.uniform(0, 1, regions).astype(np.float32)
        rows = random.standard_normal((regions, 16))
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        vectors[image_id] = rows.astype(np.float16)
    dataset = tmp_path / "train.json"
    categories = [{"id": 1, "name": "dog"}]
    dataset.write_text(json.dumps({"images": images, "annotations": [], "categories": categories}))
    write_proposals(tmp_path / "proposals.h5", dataset, boxes, objectness)
    clip = {
        "clip_weights": sha256(tiny_clip.weights),
        "clip_architecture": sha256(Path(tiny_clip.architecture)),
    }
    shards = write_shards(tmp_path, dataset, vectors, boxes, objectness, **clip)
    build_region_index(shards, RegionIndexSettings(factory="SQfp16"), tmp_path / "index")
    for seed, name in enumerate(("detector", "other_detector")):
        torch.manual_seed(seed)
        model = Detector(BACKBONE, HEADS, len(BASE), 16)
        torch.nn.init.normal_(model.box_refinement.weight, std=0.3)
        weights = {k: v.detach().numpy() for k, v in model.state_dict().items()}
        write_tensors(tmp_path / name, weights, identity("base_detector") | {"classes": BASE})
    return Project(tmp_path, tiny_clip, np.concatenate(list(objectness.values())))


def test_a_first_run_does_everything_once_and_a_second_one_trains_the_probe(project, work):
    first = project.run(NOVEL)
    images = project.images()
    assert 4 < len(images) < len(REGIONS) and len(images) % 4
    assert work.done() == {
        "names": len(BASE + NOVEL),
        "queries": len(NOVEL),
        "rows": project.rows(),  # one pass for all classes
        "images": len(images),
        "probes": len(NOVEL),
    }
    assert project.run(NOVEL) == first
    assert work.done() == NOTHING | {"probes": len(NOVEL)}


def test_an_added_class_costs_its_name_its_search_and_its_new_images(project, work):
    project.run(NOVEL)
    work.done()
    added = project.run([NOVEL[0], "owl", *NOVEL[1:]])
    new = project.images("owl") - project.images(*NOVEL)
    assert 0 < len(new) < len(project.images("owl"))
    assert work.done() == {
        "names": 1,
        "queries": 1,
        "rows": project.rows(),
        "images": len(new),
        "probes": 4,
    }
    # Bit for bit what a run of all classes gives.
    assert project.run([NOVEL[0], "owl", *NOVEL[1:]], store="new") == added
    assert len(added) == 4 + len(project.images())


def test_a_removed_class_costs_nothing_and_leaves_no_trace(project, work):
    project.run(NOVEL)
    work.done()
    fewer = project.run(NOVEL[1:])
    assert project.images() < project.images(run=0)
    assert work.done() == NOTHING | {"probes": 2}
    assert project.run(NOVEL[1:], store="new") == fewer
    work.done()
    project.run(NOVEL)  # and added again
    assert work.done() == NOTHING | {"probes": 3}


def test_a_run_into_the_folder_of_a_larger_one_leaves_what_it_would_leave_alone(project):
    project.run(NOVEL)
    alone = project.run(NOVEL[1:])
    shutil.copytree(project.runs[0], project.folder / "run2")
    assert project.run(NOVEL[1:]) == alone


@pytest.mark.parametrize(
    ("novel", "prompts", "names"),
    [
        (["bus", "carp", "traffic light"], {}, 1),
        # The same words under another name.
        (["bus", {"name": "carp", "prompt": "fish"}, "traffic light"], {}, 0),
        (NOVEL, {"fish": "a red fish"}, 1),
    ],
    ids=["renamed", "renamed with its prompt", "prompt"],
)
def test_a_renamed_class_and_a_changed_prompt_cost_that_class(project, work, novel, prompts, names):
    project.run(NOVEL)
    work.done()
    changed = project.run(novel, prompts=prompts)
    new = project.images() - project.images(run=0)
    assert work.done() == {
        "names": names,
        "queries": names,
        "rows": names * project.rows(),
        "images": len(new),
        "probes": 3,
    }
    for name in ("bus", "traffic light"):
        assert project.images(name) == project.images(name, run=0)
    assert project.run(novel, prompts=prompts, store="new") == changed


@pytest.mark.parametrize("change", [{"k": 6}, {"objectness": 0.6}, {"per_image": 1}])
def test_another_retrieval_searches_for_all_classes_and_passes_new_images_only(
    project, work, change
):
    project.run(NOVEL)
    work.done()
    settings = RETRIEVAL.model_copy(update=change)
    changed = project.run(NOVEL, settings)
    assert project.images() != project.images(run=0)
    done = work.done()
    passes, rest = divmod(done.pop("rows"), project.rows(settings.objectness))
    assert passes >= 1 and rest == 0  # a limit per image may take several
    assert done == {
        "names": 0,
        "queries": len(NOVEL),
        "images": len(project.images() - project.images(run=0)),
        "probes": 3,
    }
    assert project.run(NOVEL, settings, store="new") == changed


def test_another_detector_passes_all_images_and_embeds_and_searches_nothing(project, work):
    project.run(NOVEL)
    work.done()
    changed = project.run(NOVEL, detector="other_detector")
    assert work.done() == NOTHING | {"images": len(project.images()), "probes": 3}
    assert project.run(NOVEL, detector="other_detector", store="new") == changed


def test_the_same_clip_under_another_path_costs_nothing(project, work):
    project.run(NOVEL)
    work.done()
    same = project.folder / "copy.safetensors"
    shutil.copy(project.clip.weights, same)
    project.clip = project.clip.model_copy(update={"weights": same})
    project.run(NOVEL)
    assert work.done() == NOTHING | {"probes": 3}


def test_other_code_makes_everything_again(project, work):
    first = project.run(NOVEL)
    everything = work.done()
    again = project.run(NOVEL, code="d")
    assert work.done() == everything
    # The features name the code that made them.
    assert {p for p in first if first[p] != again[p]} == {p for p in first if "retrieved" in p}


PARTS = {
    "everything": lambda path: True,
    "the texts": lambda path: path.parent.name == "text",
    "the labels": lambda path: path.parent.name == "labels",
    "the features": lambda path: path.parent.name == "features",
    "every other file": lambda path: int(path.stem, 16) % 2,
}


@pytest.mark.parametrize("part", PARTS)
def test_what_is_deleted_from_the_store_is_made_again(project, part):
    project.run(NOVEL)
    before = project.run(NOVEL)
    deleted = [p for p in (project.folder / "store").rglob("*") if p.is_file() and PARTS[part](p)]
    assert deleted
    for path in deleted:
        path.unlink()
    # The outputs of earlier runs are whole without it.
    assert all(sha256(project.runs[0] / path) == digest for path, digest in before.items())
    assert project.run(NOVEL) == before
    assert all(path.exists() for path in deleted)


def test_a_damaged_store_is_mended(project, logged):
    before = project.run(NOVEL)
    for path in (project.folder / "store").rglob("*.*"):
        content = path.read_bytes()
        path.unlink()  # the outputs may be links to it
        path.write_bytes(content[: len(content) // 2])
    logged.clear()
    assert project.run(NOVEL) == before
    warnings = [r for r in logged.records if r.levelname == "WARNING"]
    assert len(warnings) == len(BASE + NOVEL) + len(NOVEL) + len(project.images())
    assert all("made again" in warning.getMessage() for warning in warnings)


def test_the_features_of_an_image_do_not_depend_on_the_images_beside_it(project):
    project.run(NOVEL)
    together = project.runs[0] / "retrieved"
    content = read_json(project.runs[0] / "novel.json")
    for image_id in sorted(project.images()):
        of_image = [a for a in content["annotations"] if a["image_id"] == image_id]
        labels = project.folder / "alone.json"
        labels.write_text(json.dumps(content | {"annotations": of_image}))
        alone = project.folder / f"alone{image_id}"
        extract_retrieved(
            *(project.folder / "train.json", [project.folder / "proposals.h5"], labels),
            *(project.folder / "detector", BACKBONE, HEADS, RegionFeaturesSettings(batch_size=4)),
            *(0, 1, alone, project.folder / "other_store", "c"),
        )
        (file,) = alone.iterdir()
        assert file.read_bytes() == (together / file.name).read_bytes()


def interrupt_after(calls: int) -> Callable:
    """A pyramid that ends after some batches."""
    pyramid, left = Detector.pyramid, [calls]

    def interrupted(model: Detector, images: torch.Tensor) -> list[torch.Tensor]:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return pyramid(model, images)

    return interrupted


def test_an_interrupted_job_does_not_pass_its_images_again(project, work, monkeypatch):
    whole = project.run(NOVEL)
    shutil.rmtree(project.folder / "store")
    with monkeypatch.context() as patch:
        patch.setattr(Detector, "pyramid", interrupt_after(2))
        with pytest.raises(KeyboardInterrupt):
            project.run(NOVEL)
    made = len(list((project.folder / "store/features").iterdir()))
    assert 1 < made < len(project.images(run=0))
    work.done()
    assert project.run(NOVEL) == whole
    left = len(project.images()) - made
    assert work.done() == NOTHING | {"images": left, "probes": 3}
