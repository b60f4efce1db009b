"""Stage `linear_probe`: the weights of the novel classes. Needs no torch."""

from pathlib import Path

from lpovod.artifacts import identity, write_tensors
from lpovod.config import LinearProbeSettings
from lpovod.formats.image_features import ImageFeatures, paths_in
from lpovod.formats.pseudo_labels import read_ignored, read_pseudo_labels
from lpovod.probe import fit, gather_candidates


def train_linear_probe(
    pseudo_labels: Path,
    region_features: list[Path],
    settings: LinearProbeSettings,
    seed: int,
    output: Path,
) -> None:
    """Train the novel classes' weights.

    Args:
        pseudo_labels: json of all classes.
        region_features: folders that together hold the images that the classes retrieved.
        settings: sampling and schedule.
        seed: seed of the order of images and of sampling.
        output: safetensors, {class name: (dimension,) float32}.

    Raises:
        LpovodError: if features and pseudo-labels do not belong together.
    """
    features = ImageFeatures(paths_in(region_features))
    retrieved = read_pseudo_labels(pseudo_labels)
    images = gather_candidates(retrieved, read_ignored(pseudo_labels), features)
    weights = fit(list(images.values()), len(retrieved), settings, seed)
    ident = identity(
        "linear_probe", settings, detector=features.detector, pseudo_labels=pseudo_labels
    )
    write_tensors(output, dict(zip(retrieved, weights, strict=True)), ident | {"seed": seed})
