"""Stage `model`: the run's networks and classes as one file that detects."""

import json
from pathlib import Path

from lpovod.artifacts import check_made_from, identity, read_tensors
from lpovod.config import Config
from lpovod.exceptions import LpovodError
from lpovod.formats.class_embeddings import read_text_embeddings, temperature_of
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
    networks = {"proposal_network": read_tensors(network, "proposals")[0]}
    tensors, ident = read_tensors(detector, "base_detector")
    prototypes = dict(zip(ident["classes"], tensors.pop("prototypes"), strict=True))
    networks["detector"] = tensors
    probes, probe_ident = read_tensors(linear_probe, "linear_probe")
    check_made_from(linear_probe, probe_ident, "detector", detector)
    text = read_text_embeddings(text_embeddings)
    vectors = dict(zip(text.names, text.vectors, strict=True))
    base, novel = ident["classes"], sorted(probes)
    if absent := [name for name in [*base, *novel] if name not in vectors]:
        raise LpovodError(f"class {absent[0]!r} has no text embedding in {text_embeddings}")
    ids, prompts = json.loads(categories), run.classes.prompts
    classes = [
        ModelClass(name, split, ids[name], prompts.get(name))
        for split, names in (("base", base), ("novel", novel))
        for name in names
    ]
    model = ModelFile(
        config=run,
        temperature=temperature_of(text, text_embeddings[0], run.evaluation),
        classes=classes,
        categories=ids,
        networks=networks,
        weights=prototypes | probes,
        text={c.name: vectors[c.name] for c in classes},
        identity=identity(
            STAGE,
            None,
            network=network,
            detector=detector,
            linear_probe=linear_probe,
            clip_weights=text.clip_weights,
        ),
    )
    write_model(output, model)
