"""Crops against PIL and torchvision, and against what the original code and Pillow 11 recorded."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import CenterCrop, InterpolationMode, Resize

from lpovod import crops
from lpovod.crops import crop_and_resize, crop_and_resize_batched, crop_boxes
from lpovod.exceptions import LpovodError

RECORDED = np.load(Path(__file__).parent / "data" / "crops.npz")
SHARED = Path(__file__).parents[2] / "shared" / "data"
CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32).reshape(3, 1, 1)
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32).reshape(3, 1, 1)


def pil_crop(image: np.ndarray, box, size: int, resample=Image.Resampling.BICUBIC, squash=False):
    """torchvision's transforms on PIL images, its resize done as two resizes of one axis each:
    Pillow from 13 on would choose the order of the passes by the shape."""
    crop = Image.fromarray(image).crop(tuple(int(v) for v in box))
    small = Image.new("1", crop.size)
    side = (size, size) if squash else size
    resized = Resize(side, InterpolationMode.NEAREST)(small).size
    crop = crop.resize((resized[0], crop.height), resample)
    crop = CenterCrop(size)(crop.resize(resized, resample))
    return np.asarray(crop).transpose(2, 0, 1)


FRACTION_OFF = {
    ("bicubic", "shortest"): 0.001,
    ("bicubic", "squash"): 0.002,  # 0.00101 for one sliver, whose weights reach over few pixels
    ("bilinear", "shortest"): 0,
    ("bilinear", "squash"): 0,
}
"""Of the pixels of a crop, that may be a grey level off."""


def assert_same_as_pil(image, boxes, size, interpolation="bicubic", resize_mode="shortest"):
    """Both forms: the one for a CPU, and the batched one for an accelerator."""
    boxes = np.asarray(boxes, np.int64)
    ways = {"interpolation": interpolation, "resize_mode": resize_mode}
    resample = Image.Resampling[interpolation.upper()]
    expected = [pil_crop(image, box, size, resample, resize_mode == "squash") for box in boxes]
    for cut in (
        crop_and_resize(image, boxes, size, **ways),
        crop_and_resize_batched(torch.from_numpy(image), boxes, size, **ways),
    ):
        assert_near(cut, expected, boxes, size, FRACTION_OFF[interpolation, resize_mode])


def assert_near(ours, expected, boxes, size, part):
    assert (ours.dtype, ours.shape) == (torch.uint8, (len(boxes), 3, size, size))
    for box, crop, pil in zip(boxes, ours.numpy(), expected, strict=True):
        difference = np.abs(crop.astype(int) - pil)
        assert difference.max() <= 1, box
        assert (difference > 0).mean() <= part, box


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


WAYS = pytest.mark.parametrize(
    ("interpolation", "resize_mode"),
    [
        ("bicubic", "shortest"),
        ("bilinear", "shortest"),
        ("bicubic", "squash"),
        ("bilinear", "squash"),
    ],
)


@WAYS
@pytest.mark.parametrize("size", [48, 224])
def test_crops_of_any_shape_equal_pil(size, interpolation, resize_mode):
    random = np.random.default_rng(size)
    corners = random.integers(0, [[160], [120]], (2, 40)).T, random.integers(1, 120, (40, 2))
    low = corners[0]
    high = np.minimum(low + corners[1], [160, 120])
    boxes = np.concatenate([low, high], axis=1)
    assert_same_as_pil(noise(120, 160), boxes, size, interpolation, resize_mode)


@WAYS
def test_slivers_border_boxes_and_extreme_aspects_equal_pil(interpolation, resize_mode):
    boxes = [
        [0, 0, 400, 300],
        [0, 0, 1, 1],
        [399, 299, 400, 300],
        [0, 0, 1, 300],
        [399, 0, 400, 300],
        [0, 150, 400, 151],
        [17, 3, 19, 290],
        [0, 297, 400, 300],
        [100, 100, 148, 148],
        [100, 100, 149, 148],
        [1, 1, 26, 25],
    ]
    for size in (48, 224):
        assert_same_as_pil(noise(300, 400), boxes, size, interpolation, resize_mode)


def test_wide_crops_that_are_resized_to_1684_pixels_equal_pil():
    """Of an aspect of 7.5 the centre seventh is all that is seen."""
    boxes = np.array([[3, 20, 424, 76], [0, 44, 421, 100], [79, 0, 500, 56]])
    assert 224 * 421 // 56 == 1684
    assert_same_as_pil(noise(100, 500), boxes, 224)
    assert_same_as_pil(noise(500, 100), boxes[:, [1, 0, 3, 2]], 224)


def test_a_box_of_the_result_s_size_is_the_crop_itself():
    image = noise(90, 80)
    crop = crop_and_resize(image, np.array([[11, 5, 59, 53]]), 48)[0]
    np.testing.assert_array_equal(crop.numpy(), image[5:53, 11:59].transpose(2, 0, 1))


def test_crops_come_in_the_order_of_the_boxes():
    image = noise(60, 60)
    boxes = np.array([[0, 0, n % 50 + 5, 60 - n % 40] for n in range(150)])
    together = crop_and_resize(image, boxes, 16)
    for n in (0, 63, 64, 149):
        assert torch.equal(together[n], crop_and_resize(image, boxes[n : n + 1], 16)[0])
    assert crop_and_resize(image, boxes[:0], 16).shape == (0, 3, 16, 16)
    assert crop_and_resize_batched(torch.from_numpy(image), boxes[:0], 16).shape == (0, 3, 16, 16)


def test_crops_have_full_precision_whatever_networks_compute_in():
    image, boxes = noise(60, 90), np.array([[0, 0, 80, 60], [3, 4, 20, 50]])
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    expected = crop_and_resize(image, boxes, 32)
    assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cudnn.allow_tf32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(crop_and_resize(image, boxes, 32), expected)


def test_large_crops_are_cut_a_few_at_a_time(monkeypatch):
    monkeypatch.setattr(crops, "PIXELS_AT_ONCE", 5000)
    boxes = [[0, 0, 90, 80], [5, 5, 85, 75], [0, 0, 90, 5], [3, 0, 8, 80], [1, 1, 9, 9]]
    assert_same_as_pil(noise(80, 90), boxes, 32)


def test_crops_equal_those_recorded_with_pillow_11():
    image = noise(139, 150, seed=20)
    found = crop_and_resize(image, RECORDED["boxes"], 12).numpy()
    difference = np.abs(found.astype(int) - RECORDED["crops"])
    assert difference.max() <= 1
    assert (difference > 0).mean() <= 0.001


@pytest.mark.parametrize(("scale", "recorded"), [(1.0, "crop_scale1"), (1.5, "crop_scale15")])
def test_boxes_equal_those_of_the_original_code(scale, recorded):
    boxes = crop_boxes(RECORDED["proposals"], scale, *RECORDED["wh"].tolist())
    assert boxes.dtype == np.int64
    np.testing.assert_array_equal(boxes, RECORDED[recorded])


def test_boxes_by_hand():
    box = np.array([[10, 20, 30, 60], [10.5, 20.25, 30.5, 60.75]], np.float32)
    assert crop_boxes(box, 1.0, 100, 100).tolist() == [[9, 19, 31, 61], [10, 20, 31, 61]]
    assert crop_boxes(box[:1], 1.5, 100, 100).tolist() == [[4, 9, 36, 71]]
    assert crop_boxes(box[:1], 1.5, 33, 65).tolist() == [[4, 9, 33, 65]]
    assert crop_boxes(box[:0], 1.5, 33, 65).shape == (0, 4)


@pytest.mark.parametrize(
    "box",
    [
        [50, 50, 50, 60],
        [60, 50, 50, 60],
        [101, 10, 120, 20],
        [-9, 10, -1, 20],
        [10, 81, 20, 90],
        [np.nan, 0, 5, 5],
    ],
)
def test_a_box_without_area_in_the_image_is_named(box):
    with pytest.raises(LpovodError, match=r"box 1 \[.*100 x 80 pixels.*x1 < x2"):
        crop_boxes(np.array([[0, 0, 5, 5], box], np.float32), 1.0, 100, 80)


@pytest.mark.skipif(not SHARED.exists(), reason="needs photographs")
def test_photographs_as_openai_s_preprocessing_recorded_them():
    recorded = np.load(SHARED / "clip_preprocess" / "openai_vit_b32.npz")
    for name in recorded:
        if not name.startswith("tensor_"):
            continue
        path = SHARED / "clip_preprocess" / f"{name.removeprefix('tensor_')}.jpg"
        image = np.array(Image.open(path).convert("RGB"))
        box = np.array([[0, 0, image.shape[1], image.shape[0]]])
        ours = crop_and_resize(image, box, 224)[0].numpy()
        pixels = np.rint((recorded[name] * CLIP_STD + CLIP_MEAN) * 255)
        difference = np.abs(ours - pixels)
        assert difference.max() <= 1, name
        assert (difference > 0).mean() <= 0.001, name


@pytest.mark.skipif(not SHARED.exists(), reason="needs photographs")
def test_proposals_of_a_photograph_as_the_original_code_recorded_them():
    golden = np.load(SHARED / "goldens" / "golden_extract.npz")
    path = SHARED / "coco_tiny" / "train2017" / str(golden["file_name"])
    image = np.array(Image.open(path).convert("RGB"))
    height, width = image.shape[:2]
    for column, scale in enumerate((1.0, 1.5)):
        boxes = crop_boxes(golden["proposals"][:, :4], scale, width, height)
        ours = crop_and_resize(image, boxes, 224).numpy()[:, :, ::14, ::14]
        pixels = np.rint((golden["subsample"][:, column] * CLIP_STD + CLIP_MEAN) * 255)
        difference = np.abs(ours - pixels)
        assert difference.max() <= 1
        assert (difference > 0).mean() <= 0.001
