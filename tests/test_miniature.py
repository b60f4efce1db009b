"""The miniature world: exact boxes, independent splits, the mixture it promises."""

import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from lpovod.miniature.pictograms import BASE_CLASSES, CLASSES, DISTRACTORS, NOVEL_CLASSES
from lpovod.miniature.scenes import IMAGE_SIZE, LARGEST_OCCLUSION, compose_scene, draw_scene
from lpovod.miniature.split import SPLITS, draw_split, scene_rng


@pytest.fixture(scope="module")
def scenes():
    return [compose_scene(scene_rng(0, "tune", index)) for index in range(120)]


@pytest.fixture(scope="module")
def objects(scenes):
    return [drawn for scene in scenes for drawn in scene.objects]


def test_classes_are_twelve_base_and_six_novel():
    assert len(BASE_CLASSES) == 12
    assert NOVEL_CLASSES == ("star", "ring", "bolt", "house", "fish", "cup")
    assert CLASSES == BASE_CLASSES + NOVEL_CLASSES
    assert len(set(CLASSES)) == 18


def test_the_module_needs_no_torch():
    code = "import sys, lpovod.miniature.split; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_equal_streams_draw_equal_scenes():
    first, second = (draw_scene(scene_rng(3, "val", 5)) for _ in range(2))
    assert first[0].dtype == np.uint8
    assert first[0].shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
    np.testing.assert_array_equal(first[0], second[0])
    assert first[1] == second[1]


def test_splits_seeds_and_indices_are_independent():
    streams = [scene_rng(0, split, 0) for split in SPLITS]
    streams += [scene_rng(1, "train", 0), scene_rng(0, "train", 1)]
    images = {draw_scene(rng)[0].tobytes() for rng in streams}
    assert len(images) == len(streams)


def test_boxes_are_tight_around_what_is_visible(scenes):
    for scene in scenes:
        for index, drawn in enumerate(scene.objects):
            rows, columns = np.nonzero(scene.visible == index + 1)
            expected = (
                columns.min() // 2,
                rows.min() // 2,
                -(-(columns.max() + 1) // 2),
                -(-(rows.max() + 1) // 2),
            )
            assert drawn.box == expected
            assert drawn.area == len(rows) / 4


def test_boxes_lie_within_the_image_and_hold_their_copies(objects):
    for drawn in objects:
        x1, y1, x2, y2 = drawn.box
        assert 0 <= x1 < x2 <= IMAGE_SIZE
        assert 0 <= y1 < y2 <= IMAGE_SIZE
        assert min(x2 - x1, y2 - y1) >= 5


def test_an_object_differs_from_its_ground():
    """A scene with and one without the object differ in its box alone, on every side of it."""
    rng = np.random.default_rng(0)
    for name in CLASSES:
        scene = compose_scene(rng, (name,))
        ground = np.median(scene.image[::8, ::8].reshape(-1, 3), axis=0)
        for index, drawn in enumerate(scene.objects):
            inside = scene.visible[::2, ::2] == index + 1
            contrast = np.abs(scene.image[inside].astype(float) - ground).sum(1)
            assert np.median(contrast) > 40, (name, drawn)


def test_objects_stay_mostly_visible(scenes):
    drawn_area = Counter()
    for scene in scenes:
        for drawn in scene.objects:
            drawn_area[drawn.name] += drawn.area
            assert drawn.area >= 15
    assert LARGEST_OCCLUSION <= 0.1


@pytest.mark.slow
def test_all_classes_are_about_equally_frequent():
    items = Counter()
    for index in range(400):
        scene = compose_scene(scene_rng(0, "tune", index))
        items.update({drawn.item: drawn.name for drawn in scene.objects}.values())
    mean = items.total() / len(CLASSES)
    assert set(items) == set(CLASSES)
    assert all(0.6 * mean < count < 1.45 * mean for count in items.values()), items


def test_half_of_the_items_are_clusters_of_one_class(scenes):
    sizes = []
    for scene in scenes:
        members = Counter(drawn.item for drawn in scene.objects)
        sizes += members.values()
        for item in members:
            assert len({drawn.name for drawn in scene.objects if drawn.item == item}) == 1
    assert max(sizes) <= 4
    assert 0.4 < np.mean([size > 1 for size in sizes]) < 0.6


def test_members_of_a_cluster_touch_another(scenes):
    for scene in scenes:
        for drawn in scene.objects:
            others = [o.box for o in scene.objects if o.item == drawn.item and o is not drawn]
            gaps = [
                max(drawn.box[axis], box[axis]) - min(drawn.box[axis + 2], box[axis + 2])
                for box in others
                for axis in (0, 1)
            ]
            nearest = [max(pair) for pair in zip(gaps[::2], gaps[1::2], strict=True)]
            assert not nearest or min(nearest) <= 4


def test_two_fifths_carry_a_copy_that_is_no_object(objects):
    copies = [drawn for drawn in objects if drawn.copy is not None]
    assert 0.33 < len(copies) / len(objects) < 0.47
    for drawn in copies:
        assert _iou(drawn.copy, drawn.box) < 0.5


def test_parts_of_novel_objects_are_false_detections(objects):
    ious = [
        _iou(part, drawn.box)
        for drawn in objects
        if drawn.name in NOVEL_CLASSES
        for part in drawn.parts
    ]
    assert np.mean(np.array(ious) < 0.5) > 0.6


def test_only_the_classes_asked_for_are_drawn():
    scene = compose_scene(np.random.default_rng(1), ("fish",))
    assert {drawn.name for drawn in scene.objects} == {"fish"}
    with pytest.raises(ValueError, match="unicorn"):
        compose_scene(np.random.default_rng(1), ("unicorn",))


def test_a_split_is_a_valid_coco_data_set(tmp_path):
    coco = draw_split(tmp_path / "val", images=6, seed=2, split="val")
    assert {category["name"] for category in coco["categories"]} == set(CLASSES)
    ids = {category["id"] for category in coco["categories"]}
    image_ids = [record["id"] for record in coco["images"]]
    assert len(set(image_ids)) == 6
    assert len({a["id"] for a in coco["annotations"]}) == len(coco["annotations"])
    for annotation in coco["annotations"]:
        assert annotation["category_id"] in ids
        assert annotation["image_id"] in image_ids
        x, y, width, height = annotation["bbox"]
        assert 0 < annotation["area"] <= width * height
        assert x + width <= IMAGE_SIZE and y + height <= IMAGE_SIZE
    for record in coco["images"]:
        with Image.open(tmp_path / "val" / record["file_name"]) as image:
            assert image.size == (record["width"], record["height"])
    files = {path.name for path in (tmp_path / "val").iterdir()}
    assert files == {record["file_name"] for record in coco["images"]}


def test_a_split_repeats_bit_for_bit_and_grows_without_changing(tmp_path):
    few = draw_split(tmp_path / "few", images=3, seed=2, split="train")
    more = draw_split(tmp_path / "more", images=4, seed=2, split="train")
    assert more["images"][:3] == few["images"]
    assert more["annotations"][: len(few["annotations"])] == few["annotations"]
    for record in few["images"]:
        name = record["file_name"]
        assert (tmp_path / "few" / name).read_bytes() == (tmp_path / "more" / name).read_bytes()


def test_image_ids_are_unique_over_splits(tmp_path):
    drawn = [draw_split(tmp_path / split, 3, 0, split) for split in SPLITS]
    ids = [record["id"] for coco in drawn for record in coco["images"]]
    assert len(set(ids)) == len(ids)


def test_an_unknown_split_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'test'.*train"):
        draw_split(tmp_path, images=1, seed=0, split="test")


def _iou(a, b):
    width = max(min(a[2], b[2]) - max(a[0], b[0]), 0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    areas = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return width * height / (areas - width * height)


def test_distractors_are_drawn_beside_the_objects_and_never_annotated(tmp_path):
    found = draw_split(tmp_path / "with", 12, 0, "tune", distractors=0.5)
    without = draw_split(tmp_path / "without", 12, 0, "tune")
    scenes = [compose_scene(scene_rng(0, "tune", index), distractors=0.5) for index in range(12)]
    drawn = [thing.name for scene in scenes for thing in scene.objects]
    assert set(drawn) & set(DISTRACTORS)
    annotated = [name for name in drawn if name in CLASSES]
    names = {category["id"]: category["name"] for category in found["categories"]}
    assert [names[a["category_id"]] for a in found["annotations"]] == annotated
    assert len(found["annotations"]) == len(without["annotations"])
    assert set(names.values()) == set(CLASSES)
