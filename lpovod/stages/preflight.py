"""Check before the first job: models, weights and index against the configuration."""

import warnings
from collections.abc import Callable

import torch

from lpovod.clip import check_clip
from lpovod.config import Config
from lpovod.exceptions import LpovodError
from lpovod.formats.index import make_index
from lpovod.importers.backbone import fitting_tensors
from lpovod.networks.backbone import build_backbone
from lpovod.networks.detector import Detector
from lpovod.networks.meta import on_meta
from lpovod.networks.proposal_network import ProposalNetwork

DIVISIBLE = 960
"""Dimension that most factories accept, in place of one that is unknown for another problem."""


def preflight(config: Config) -> None:
    """Refuse a configuration with which a job would fail as soon as it has loaded its models.

    Names and shapes are compared; nothing is computed. Weights that are not downloaded yet are not
    compared, nor is anything of a stage whose artifact is imported.

    Args:
        config: the whole configuration.

    Raises:
        LpovodError: naming every problem.
    """
    problems: list[str] = []
    dimension = None
    if config.clip.weights is not None:
        dimension = _check(lambda: check_clip(config.clip, _texts(config)), "clip", problems)
    _check(lambda: _check_backbone(config, dimension or 1), "backbone", problems)
    imported = config.linear_probe.checkpoint or config.pseudo_labels.file
    if config.clip.weights is not None and not imported:
        factory, length = config.region_index.factory, dimension or DIVISIBLE
        _check(lambda: make_index(factory, length), "region_index.factory", problems)
    if problems:
        raise LpovodError("\nerror: ".join(problems))


def _texts(config: Config) -> list[str]:
    """What CLIP is going to read."""
    classes = config.classes
    templates = ["{}"] if config.text_embeddings.file else config.text_embeddings.templates
    words = [classes.prompts.get(name, name) for name in [*classes.base, *classes.novel]]
    return [template.format(word) for template in templates for word in words]


def _check(check: Callable[[], int | object], block: str, problems: list[str]) -> int | None:
    """Run a check; append its problem and return None, or return its number."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # timm's, of old names
        try:
            result = check()
        except LpovodError as error:
            problems.append(str(error))
            return None
        except Exception as error:  # a model's constructor fails in its own way on wrong numbers
            reason = " ".join(str(error).split())
            problems.append(f"{block}: cannot be built: {type(error).__name__}: {reason}")
            return None
    return result if isinstance(result, int) else None


def _check_backbone(config: Config, embedding: int) -> None:
    """Build what is trained, and compare the weights that it starts from."""
    backbone, weights = config.backbone, config.backbone.weights
    on_meta(lambda: torch.nn.ModuleList(build_backbone(backbone)))
    if weights is None or not weights.is_file():
        return
    if not config.proposals.files:
        network = on_meta(lambda: ProposalNetwork(backbone, config.proposals.anchor_scale))
        fitting_tensors(network, weights, backbone.architecture)
    if not config.base_detector.checkpoint:
        classes = len(config.classes.base)
        detector = on_meta(lambda: Detector(backbone, config.base_detector, classes, embedding))
        fitting_tensors(detector, weights, backbone.architecture)
