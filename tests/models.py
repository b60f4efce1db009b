"""Model files with random weights, for tests of programs that read one."""

from pathlib import Path

import numpy as np
import torch

from lpovod.artifacts import identity
from lpovod.config import Config
from lpovod.formats.model import STAGE, ModelClass, ModelFile, write_model
from lpovod.networks.detector import Detector
from lpovod.networks.proposal_network import ProposalNetwork

BASE, NOVEL = ["dog", "cat"], ["bus", "fish"]
DIMENSION = 16  # of the embeddings
SMALL = {
    "classes": {"base": BASE, "novel": NOVEL},
    "backbone": {"channels": 16, "short_side": 96, "long_side": 128},
    "proposals": {"per_image": 20, "per_level": 100},
    "base_detector": {
        "regions": "proposals",
        "head_convolutions": 1,
        "dimension": 24,
        "finest_scale": 16,
        "sampling_ratio": 1,
    },
}
"""The settings of networks that take milliseconds."""


def random_model(path: Path, seed: int = 0, **settings) -> ModelFile:
    """Write a model of untrained networks, whose scores are spread; return its content.

    Args:
        path: of the file.
        seed: of all weights.
        **settings: blocks of the configuration that differ from these.
    """
    config = Config.model_validate(SMALL | settings)
    torch.manual_seed(seed)
    network = ProposalNetwork(config.backbone, config.proposals.anchor_scale).eval()
    detector = Detector(config.backbone, config.base_detector, len(BASE), DIMENSION).eval()
    torch.nn.init.normal_(network.objectness.weight, std=3.0)
    torch.nn.init.normal_(network.distances.weight, std=0.5)
    torch.nn.init.normal_(detector.box_refinement.weight, std=0.3)
    random = np.random.default_rng(seed)
    names = [*BASE, *NOVEL]
    text = random.normal(size=(len(names), DIMENSION)).astype(np.float32)
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    weights = random.normal(size=(len(names), config.base_detector.dimension)).astype(np.float32)
    tensors = arrays(detector)
    del tensors["prototypes"]
    model = ModelFile(
        config=config,
        temperature=0.1,
        classes=[
            ModelClass(name, "base" if name in BASE else "novel", category_id)
            for name, category_id in zip(names, (3, 1, 7, 5), strict=True)
        ],
        categories={"cup": 9},
        networks={"proposal_network": arrays(network), "detector": tensors},
        weights=dict(zip(names, weights, strict=True)),
        text=dict(zip(names, text, strict=True)),
        identity=identity(STAGE, None, detector="d" * 64, clip_weights="none"),
    )
    write_model(path, model)
    return model


def arrays(module: torch.nn.Module) -> dict[str, np.ndarray]:
    """The weights of a network."""
    return {name: tensor.detach().numpy().copy() for name, tensor in module.state_dict().items()}
