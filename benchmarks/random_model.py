"""Models of any size with random weights, whose time is that of trained ones."""

import numpy as np
import torch

from lpovod.artifacts import identity
from lpovod.config import Config
from lpovod.formats.model import STAGE, ModelClass, ModelFile
from lpovod.networks.detector import Detector
from lpovod.networks.proposal_network import ProposalNetwork

CLIP_DIMENSION = 512


def random_model(config: Config) -> ModelFile:
    """A model of a configuration, untrained.

    Args:
        config: sizes of the networks, and the classes.
    """
    torch.manual_seed(0)
    base, novel = config.classes.base, config.classes.novel
    network = ProposalNetwork(config.backbone, config.proposals.anchor_scale)
    detector = Detector(config.backbone, config.base_detector, len(base), CLIP_DIMENSION)
    tensors = _arrays(detector)
    prototypes = dict(zip(base, tensors.pop("prototypes"), strict=True))
    random, dimension = np.random.default_rng(0), config.base_detector.dimension
    probes = {name: random.normal(0, 0.01, dimension).astype(np.float32) for name in novel}
    names = [*base, *novel]
    text = random.normal(size=(len(names), CLIP_DIMENSION)).astype(np.float32)
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    return ModelFile(
        config=config,
        temperature=0.01,
        classes=[
            ModelClass(name, "base" if name in base else "novel", number)
            for number, name in enumerate(names, 1)
        ],
        categories={},
        networks={"proposal_network": _arrays(network), "detector": tensors},
        weights=prototypes | probes,
        text=dict(zip(names, text, strict=True)),
        identity=identity(STAGE),
    )


def _arrays(module: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in module.state_dict().items()}
