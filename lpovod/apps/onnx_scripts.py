"""The small graphs around the networks, in onnxscript: Python that is read, not run.

Within a script a name from outside is a constant, and a number has the type of what it meets.
"""

# What the decorator turns into a graph is no Python to mypy.
# mypy: ignore-errors

import numpy as np
from onnx import ModelProto, TensorProto, numpy_helper
from onnxscript import FLOAT, FLOAT16, INT64, UINT8, script
from onnxscript import opset18 as op
from onnxscript.values import Opset

from lpovod.config import BackboneSettings
from lpovod.views import PAD_TO, WEIGHT_BITS, Normalisation

PREPARED = ("zero_padded", "black_padded", "scale", "size", "shown")
"""What the networks need of an image."""
TO_DOUBLE, TO_FLOAT = TensorProto.DOUBLE, TensorProto.FLOAT
TO_INT32, TO_INT64 = TensorProto.INT32, TensorProto.INT64
HEIGHT, WIDTH = "height", "width"
REGIONS, CLASSES, BEST = "regions", "classes", "detections"
DIMENSION, CLIP_DIMENSION = "dimension", "clip_dimension"

LPOVOD = Opset("lpovod", 1)
UNIT = float(2**WEIGHT_BITS)


@script(LPOVOD, default_opset=op)
def taps(old: INT64, new: INT64):
    """`views._taps` of an axis."""
    places = op.Cast(op.Range(0, new, 1), to=TO_DOUBLE)
    ratio = op.Cast(old, to=TO_DOUBLE) / op.Cast(new, to=TO_DOUBLE)
    centre = op.Cast((places + 0.5) * ratio - 0.5, to=TO_FLOAT)
    part = centre - op.Floor(centre)
    before = op.Cast(op.Floor(centre), to=TO_INT64)
    first = op.Clip(before, 0, old - 1)
    second = op.Clip(before + 1, 0, old - 1)
    weight = op.Cast(op.Round((1.0 - part) * UNIT), to=TO_INT32)
    other = op.Cast(op.Round(part * UNIT), to=TO_INT32)
    return first, second, weight, other


@script(LPOVOD, default_opset=op)
def resize(image: UINT8, height: INT64, width: INT64):
    """`views.resize` of (H, W, 3) bytes, to the same bits."""
    rows, columns = op.Split(op.Shape(image, start=0, end=2), num_outputs=2)
    left, right, at_left, at_right = taps(op.Squeeze(columns), width)
    above, below, at_top, at_bottom = taps(op.Squeeze(rows), height)
    inner = op.Cast(op.Gather(image, left, axis=1), to=TO_INT32) * op.Unsqueeze(at_left, [1])
    outer = op.Cast(op.Gather(image, right, axis=1), to=TO_INT32) * op.Unsqueeze(at_right, [1])
    blended = (inner + outer) / 16
    upper = op.Gather(blended, above, axis=0) * op.Unsqueeze(at_top, [1, 2]) / 65536
    lower = op.Gather(blended, below, axis=0) * op.Unsqueeze(at_bottom, [1, 2]) / 65536
    return op.Cast((upper + lower + 2) / 4, to=TO_FLOAT)


def preparation(backbone: BackboneSettings, normalisation: Normalisation) -> ModelProto:
    """The graph from an image to what the networks and their boxes need."""
    short_side, long_side = float(backbone.short_side), float(backbone.long_side)
    mean = numpy_helper.from_array(np.array(normalisation.mean, np.float32).reshape(3, 1, 1))
    std = numpy_helper.from_array(np.array(normalisation.std, np.float32).reshape(3, 1, 1))

    @script(LPOVOD, default_opset=op)
    def prepare(image: UINT8[HEIGHT, WIDTH, 3]):
        sides = op.Shape(image, start=0, end=2)
        exact = op.Cast(sides, to=TO_DOUBLE)
        by_long = long_side / op.ReduceMax(exact, keepdims=0)
        by_short = short_side / op.ReduceMin(exact, keepdims=0)
        shown_sides = op.Cast(exact * op.Min(by_long, by_short) + 0.5, to=TO_INT64)
        shown_sides = op.Max(shown_sides, 1)
        rows, columns = op.Split(shown_sides, num_outputs=2)
        pixels = resize(image, op.Squeeze(rows), op.Squeeze(columns))
        pixels = op.Unsqueeze(op.Transpose(pixels, perm=[2, 0, 1]), [0])
        padding = op.Concat([0, 0, 0, 0, 0, 0], op.Mod(0 - shown_sides, PAD_TO), axis=0)
        means = op.Constant(value=mean)
        stds = op.Constant(value=std)
        zero_padded = op.Pad((pixels - means) / stds, padding)
        black_padded = (op.Pad(pixels, padding) - means) / stds
        ratio = op.Cast(op.Cast(shown_sides, to=TO_DOUBLE) / exact, to=TO_FLOAT)
        scale = op.Gather(ratio, [1, 0])
        size = op.Gather(op.Cast(sides, to=TO_FLOAT), [1, 0])
        shown = op.Gather(op.Cast(shown_sides, to=TO_FLOAT), [1, 0])
        return zero_padded, black_padded, scale, size, shown

    return prepare.to_model_proto()


@script(LPOVOD, default_opset=op)
def score_classes(
    feature: FLOAT16[REGIONS, DIMENSION],
    embedding: FLOAT16[REGIONS, CLIP_DIMENSION],
    objectness: FLOAT[REGIONS],
    weights: FLOAT[CLASSES, DIMENSION],
    text: FLOAT[CLASSES, CLIP_DIMENSION],
    probe_weights: FLOAT[CLASSES],
    temperature: FLOAT,
) -> FLOAT[REGIONS, CLASSES]:
    """`scoring.final_scores`."""
    probe = op.Sigmoid(op.MatMul(op.Cast(feature, to=TO_FLOAT), op.Transpose(weights)))
    cosine = op.MatMul(op.Cast(embedding, to=TO_FLOAT), op.Transpose(text))
    clip = op.Softmax(cosine / temperature, axis=1)
    both = op.Pow(clip, 1.0 - probe_weights) * op.Pow(probe, probe_weights)
    scores = op.Sqrt(both * op.Unsqueeze(objectness, [1]))
    return scores


@script(LPOVOD, default_opset=op)
def best_detections(
    boxes: FLOAT[REGIONS, 4],
    scores: FLOAT[REGIONS, CLASSES],
    score_threshold: FLOAT,
    nms: FLOAT,
    per_image: INT64,
) -> tuple[FLOAT[BEST, 4], FLOAT[BEST], INT64[BEST]]:
    """`scoring.detect`: ONNX's NMS is within each class, and above a threshold."""
    limit = op.Reshape(per_image, [1])
    by_class = op.Unsqueeze(op.Transpose(scores), [0])
    kept = op.NonMaxSuppression(
        op.Unsqueeze(boxes, [0]),
        by_class,
        limit,
        op.Reshape(nms, [1]),
        op.Reshape(score_threshold, [1]),
    )
    above = op.GatherND(by_class, kept)
    confidence, best = op.TopK(above, op.Min(op.Shape(above), limit))
    kept = op.Gather(kept, best)
    column = op.Gather(kept, 1, axis=1)
    xyxy = op.Gather(boxes, op.Gather(kept, 2, axis=1))
    return xyxy, confidence, column
