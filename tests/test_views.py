"""Images on their way into a network."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from lpovod.config import TrainingSettings
from lpovod.formats.coco import CocoDataset
from lpovod.views import (
    MEAN,
    STD,
    LoadedView,
    Normalisation,
    View,
    apply_view,
    batch,
    inference_views,
    load_views,
    resize,
    steps_per_epoch,
    training_batches,
    training_views,
)


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("size", "short", "long", "expected"),
    [
        ((480, 640), 800, 1333, (800, 1067)),
        ((427, 640), 800, 1333, (800, 1199)),
        ((200, 1000), 800, 1333, (267, 1333)),
        ((1000, 200), 800, 1333, (1333, 267)),
        ((160, 160), 160, 160, (160, 160)),
    ],
)
def test_the_resized_size(size, short, long, expected):
    shown = apply_view(noise(*size), View(1, short, long))
    assert tuple(shown.pixels.shape[1:]) == expected
    ratios = [expected[1] / size[1], expected[0] / size[0]]
    assert shown.scale.tolist() == pytest.approx(ratios, rel=1e-6)


def test_an_image_of_the_right_size_is_not_touched():
    pixels = noise(160, 160)
    assert np.array_equal(apply_view(pixels, View(1, 160, 160)).pixels.permute(1, 2, 0), pixels)


@pytest.mark.parametrize("size", [(31, 64), (15, 20), (60, 47)])
def test_resized_pixels_are_within_a_grey_level_of_the_exact_ones(size):
    """Weights have 11 bits; that they are OpenCV's to the bit is shown in `test_fidelity.py`."""
    pixels = torch.from_numpy(noise(30, 40)).permute(2, 0, 1)
    exact = functional.interpolate(pixels[None].double(), size=size, mode="bilinear")[0]
    assert float((resize(pixels, *size) - exact).abs().max()) <= 1


def test_boxes_are_cut_to_the_view():
    shown = apply_view(noise(100, 200), View(1, 50, 1000))
    found = shown.to_view(np.array([[-3, 10, 201, 130]], np.float32))
    assert found.tolist() == [[0, 5, 100, 50]]


def test_boxes_follow_resize_and_flip():
    shown = apply_view(noise(100, 200), View(1, 50, 1000, flip=True))
    found = shown.to_view(np.array([[20, 10, 60, 30]], np.float32))
    assert found.tolist() == [[70, 5, 90, 15]]
    unflipped = apply_view(noise(100, 200), View(1, 50, 1000))
    assert torch.equal(shown.pixels.flip(2), unflipped.pixels)


@pytest.mark.parametrize("pad_with_black", [True, False])
def test_a_batch_is_normalised_and_padded(pad_with_black):
    views = [
        apply_view(noise(h, w), View(1, min(h, w), max(h, w))) for h, w in ((40, 70), (33, 20))
    ]
    found = batch(views, "cpu", Normalisation(MEAN, STD), pad_with_black)
    assert found.shape == (2, 3, 64, 96)
    for c in range(3):
        expected = (views[1].pixels[c].numpy() - MEAN[c]) / STD[c]
        assert np.allclose(found[1, c, :33, :20], expected, atol=1e-5)
        padding = -MEAN[c] / STD[c] if pad_with_black else 0
        assert np.allclose(found[1, c, 33:], padding, atol=1e-5)
        assert np.allclose(found[1, c, :, 20:], padding, atol=1e-5)


def test_a_batch_is_filled_up_with_empty_images():
    views = [apply_view(noise(40, 60), View(1, 40, 60))]
    filled, alone = (batch(views, "cpu", Normalisation(), at_least=n) for n in (3, 0))
    assert filled.shape == (3, 3, 64, 64)
    assert torch.equal(filled[:1], alone)
    assert not filled[1:].any()


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize(("short", "long"), [(50, 90), (20, 1000), (40, 70)])
def test_a_device_resizes_to_the_same_bits(short, long, flip):
    pixels, view = noise(40, 70), View(1, short, long, flip)
    here, there = apply_view(pixels, view), apply_view(pixels, view, on_device=True)
    assert here.size == there.size
    assert torch.equal(here.scale, there.scale)
    assert there.pixels.shape == (3, 40, 70)
    assert torch.equal(there.shown_on("cpu"), here.pixels)
    box = np.array([[3, 4, 60, 30]], np.float32)
    assert torch.equal(there.to_view(box), here.to_view(box))
    assert torch.equal(*(batch([v], "cpu", Normalisation()) for v in (here, there)))


def test_every_image_is_seen_once_per_epoch_in_another_order():
    settings = TrainingSettings(short_sides=[160, 192], flip=0.5)
    data = sized(dict.fromkeys(range(200), (90, 60)))
    ids = list(range(200))
    epochs = [training_views(data, ids, settings, 320, 0, epoch) for epoch in (0, 1, 1)]
    ids = [[view.image_id for view in views] for views in epochs]
    assert sorted(ids[0]) == sorted(ids[1]) == list(range(200))
    assert ids[0] != ids[1]
    assert epochs[1] == epochs[2]
    assert 60 < sum(view.flip for view in epochs[0]) < 140
    assert {view.short_side for view in epochs[0]} == {160, 192}


def sized(sizes: dict[int, tuple[int, int]]) -> CocoDataset:
    """Images of given width and height, without pixels."""
    images = {i: {"file_name": "", "width": w, "height": h} for i, (w, h) in sizes.items()}
    return CocoDataset(Path("train.json"), images, {i: [] for i in images}, {})


def test_every_step_is_full_and_of_one_orientation():
    data = sized({i: (60, 90) if i % 3 else (90, 60) for i in range(50)})  # 33 upright, 17 wide
    views = training_views(data, list(data.images), TrainingSettings(images_per_step=4), 320, 0, 0)
    ids = [view.image_id for view in views]
    assert len(ids) == 4 * steps_per_epoch(data, list(data.images), 4) == 36 + 20
    assert set(ids) == set(range(50))
    steps = [{i % 3 > 0 for i in ids[first : first + 4]} for first in range(0, 56, 4)]
    assert steps[-2:] == [{True}, {False}]
    assert all(len(orientations) == 1 for orientations in steps)
    for upright, last in ((True, ids[48:52]), (False, ids[52:])):
        first = [i for i in ids if (i % 3 > 0) == upright][:3]
        assert last[1:] == first  # an image of its own, filled up with the first ones


def test_a_step_may_have_more_images_than_there_are():
    data = sized({5: (60, 90), 7: (60, 90)})
    views = training_views(data, [5, 7], TrainingSettings(images_per_step=5), 320, 0, 0)
    ids = [view.image_id for view in views]
    assert ids in ([5, 7, 5, 7, 5], [7, 5, 7, 5, 7])


def drawn(folder: Path, sizes: list[tuple[int, int]]) -> CocoDataset:
    """Images of given height and width, numbered."""
    (folder / "images" / "train").mkdir(parents=True)
    images = {}
    for number, (height, width) in enumerate(sizes):
        images[number] = {"file_name": f"{number}.png", "width": width, "height": height}
        Image.fromarray(noise(height, width)).save(folder / "images/train" / f"{number}.png")
    return CocoDataset(folder / "train.json", images, {i: [] for i in images}, {})


def test_images_that_are_padded_to_one_size_share_batches(tmp_path):
    """Sides of 40 and 64 are padded to 64, 65 to 96; in the order of the ids within a size."""
    sizes = [(40, 64), (64, 40), (40, 60), (40, 64), (40, 65), (33, 40), (40, 50)]
    data = drawn(tmp_path, sizes)
    lists = list(inference_views(data, [6, 0, 4, 1, 2, 3, 5], 40, 90, per_batch=3))
    assert [[v.view.image_id for v in views] for views in lists] == [[6, 0, 1], [2, 3, 5], [4]]
    for views in lists:
        shape = batch(views, "cpu", Normalisation()).shape[1:]
        for view in views:
            assert batch([view], "cpu", Normalisation()).shape[1:] == shape


def test_a_device_s_images_are_decoded_by_processes_and_resized_by_itself(tmp_path):
    """`meta` stands for a GPU; one process loads as three do."""
    data = drawn(tmp_path, [(20, 30)] * 5)
    ids = list(data.images)
    here = [v for views in inference_views(data, ids, 40, 90, 2) for v in views]
    for threads in (1, 3):
        views = inference_views(data, ids, 40, 90, 2, "meta", threads)
        there = [v for part in views for v in part]
        assert [v.view for v in there] == [v.view for v in here]
        assert all(v.pixels.shape == (3, 20, 30) for v in there)
        for one, other in zip(here, there, strict=True):
            assert torch.equal(other.shown_on("cpu"), one.pixels)


def test_loading_is_the_same_for_any_number_of_workers(tmp_path):
    data = drawn(tmp_path, [(20, 30)] * 5)
    images = data.images
    views = [View(i, 20, 30, flip=i % 2 == 0) for i in images]
    runs = [
        [[v.pixels for v in views_] for views_ in load_views(data, views, 2, workers)]
        for workers in (0, 2)
    ]
    assert [len(part) for part in runs[0]] == [2, 2, 1]
    for one, other in zip(*runs, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_loading_processes_load_several_epochs(tmp_path):
    (tmp_path / "images" / "train").mkdir(parents=True)
    images = {}
    for number in range(5):
        images[number] = {"file_name": f"{number}.png", "width": 30, "height": 20}
        Image.fromarray(noise(20, 30)).save(tmp_path / "images/train" / f"{number}.png")
    data = CocoDataset(tmp_path / "train.json", images, {i: [] for i in images}, {})
    runs, processes = [], []
    for workers in (0, 2):
        settings = TrainingSettings(images_per_step=2, short_sides=[20], workers=workers)
        inputs = (data, list(images), settings, 30, 0, "cpu", process_of)
        batches = training_batches(*inputs)
        # A whole epoch, and another one from its second step on.
        loaded = [views for start in ((0, 0), (1, 1)) for views in batches(*start)]
        runs.append([[view.view for view in views] for views in loaded])
        processes.append({view.extra for views in loaded for view in views})
    assert runs[0] == runs[1]
    assert [len(views) for views in runs[0]] == [2, 2, 2, 2, 2]
    assert processes[0] == {os.getpid()}
    assert len(processes[1]) == 2  # not two for each epoch


def process_of(loaded: LoadedView) -> int:
    return os.getpid()
