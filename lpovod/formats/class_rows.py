"""The rows of all classes, linear classifiers and text embeddings, joined by class name."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lpovod.artifacts import check_made_from, read_tensors
from lpovod.exceptions import LpovodError
from lpovod.formats.class_embeddings import ClassEmbeddings, read_text_embeddings


@dataclass(frozen=True)
class ClassRows:
    """The rows of all classes.

    Attributes:
        base: names of the base classes.
        novel: names of the novel classes.
        weights: by name, the linear classifier (dimension,) float32.
        vectors: by name, the unit text embedding (D,) float32; of other names, too.
        text: what the embeddings were made with.
        detector: all tensors of the base detector by name, but for the base classes' rows.
    """

    base: list[str]
    novel: list[str]
    weights: dict[str, np.ndarray]
    vectors: dict[str, np.ndarray]
    text: ClassEmbeddings
    detector: dict[str, np.ndarray]


def read_class_rows(detector: Path, linear_probe: Path, text_embeddings: list[Path]) -> ClassRows:
    """Join base prototypes, novel weights and text embeddings by class name.

    Raises:
        LpovodError: if a class has no text embedding, or the probe belongs to another detector.
    """
    tensors, ident = read_tensors(detector, "base_detector")
    probes, probe_ident = read_tensors(linear_probe, "linear_probe")
    check_made_from(linear_probe, probe_ident, "detector", detector)
    text = read_text_embeddings(text_embeddings)
    vectors = dict(zip(text.names, text.vectors, strict=True))
    base, novel = ident["classes"], sorted(probes)
    for name in [*base, *novel]:
        if name not in vectors:
            raise LpovodError(f"class {name!r} has no text embedding in {text_embeddings}")
    prototypes = dict(zip(base, tensors.pop("prototypes"), strict=True))
    return ClassRows(base, novel, prototypes | probes, vectors, text, tensors)
