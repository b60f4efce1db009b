"""Stage `model`: the run's networks and classes as one file that detects."""

import json
from pathlib import Path

from lpovod.artifacts import identity, read_tensors
from lpovod.config import Config
from lpovod.formats.class_embeddings import temperature_of
from lpovod.formats.class_rows import read_class_rows
from lpovod.formats.model import STAGE, ModelClass, ModelFile, write_model


def join_model(
    run: Config,
    categories: str,
    network: Path,
    detector: Path,
    linear_probe: Path,
    text_embeddings: list[Path],
    output: Path,
) -> None:
    """Write the model file (`lpovod.formats.model`).

    Args:
        run: the configuration.
        categories: json, the ids of the data set's categories and of all classes, by name.
        network: the trained proposal network.
        detector: the trained base detector.
        linear_probe: weights of the novel classes.
        text_embeddings: files that together hold all classes.
        output: safetensors.

    Raises:
        LpovodError: if the files do not belong together.
    """
    rows = read_class_rows(detector, linear_probe, text_embeddings)
    ids, prompts = json.loads(categories), run.classes.prompts
    classes = [
        ModelClass(name, split, ids[name], prompts.get(name))
        for split, names in (("base", rows.base), ("novel", rows.novel))
        for name in names
    ]
    model = ModelFile(
        config=run,
        temperature=temperature_of(rows.text, text_embeddings[0], run.evaluation),
        classes=classes,
        categories=ids,
        networks={
            "proposal_network": read_tensors(network, "proposals")[0],
            "detector": rows.detector,
        },
        weights=rows.weights,
        text={c.name: rows.vectors[c.name] for c in classes},
        identity=identity(
            STAGE,
            None,
            network=network,
            detector=detector,
            linear_probe=linear_probe,
            clip_weights=rows.text.clip_weights,
        ),
    )
    write_model(output, model)
