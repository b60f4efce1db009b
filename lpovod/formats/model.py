"""The model file: everything that detects, in one safetensors file with a json card.

Networks, a weight vector and a text embedding for each class, thresholds and preprocessing; and
those settings of the run with which it detects and learns further classes. Tensors are named
``proposal_network/<name>``, ``detector/<name>``, ``weight/<class>`` (dimension,), ``text/<class>``
(D,) unit, ``query/<class>`` (D,) unit and, if asked for, ``text_tower/<name>``. Needs no torch.
"""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from lpovod.artifacts import Identity, read_tensors, write_tensors
from lpovod.config import Config
from lpovod.exceptions import LpovodError
from lpovod.formats.coco import ids_of

STAGE = "model"
FORMAT = 2


@dataclass(frozen=True)
class ModelClass:
    """A class of the vocabulary.

    Attributes:
        name: of the class.
        split: base or novel.
        category_id: in the run's data set.
        prompt: what CLIP reads in place of the name.
        learned: for a class that was added to a finished model: how (`lpovod.apps.learn`).
    """

    name: str
    split: str
    category_id: int
    prompt: str | None = None
    learned: dict[str, Any] | None = None


@dataclass(frozen=True)
class ModelFile:
    """The content of a model file.

    Attributes:
        config: of the run, without its data.
        temperature: of the softmax over cosines.
        classes: the vocabulary: base classes, novel ones, then learned ones.
        categories: ids of all categories of the run's data set by name.
        networks: tensors of ``proposal_network`` and ``detector`` by name.
        weights: (dimension,) float32 linear classifier of each class that has one.
        text: (D,) float32 unit text embedding of each class that CLIP scores.
        identity: of the run's files that this one was made from.
        queries: (D,) float32 unit vector that the regions of a learned class were retrieved with.
        clip: open_clip's configuration of CLIP, if the file holds its text tower; or empty.
        text_tower: tensors of the text tower.
        merges: byte-pair merges of its tokenizer, gzipped, (bytes,) uint8; empty for CLIP's.
    """

    config: Config
    temperature: float
    classes: list[ModelClass]
    categories: dict[str, int]
    networks: dict[str, dict[str, np.ndarray]]
    weights: dict[str, np.ndarray]
    text: dict[str, np.ndarray]
    identity: Identity
    queries: dict[str, np.ndarray] = field(default_factory=dict)
    clip: dict[str, Any] = field(default_factory=dict)
    text_tower: dict[str, np.ndarray] = field(default_factory=dict)
    merges: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint8))

    @property
    def names(self) -> list[str]:
        """Names of the classes."""
        return [c.name for c in self.classes]

    def of_split(self, split: str) -> list[str]:
        """Names of the classes of a split."""
        return [c.name for c in self.classes if c.split == split]

    def class_of(self, name: str) -> ModelClass | None:
        """The class of a name, or None."""
        return next((c for c in self.classes if c.name == name), None)

    def id_of(self, name: str) -> int:
        """The category id of a class: its own, the data set's, or the next one."""
        taken = self.categories | {c.name: c.category_id for c in self.classes}
        return ids_of(taken, [name])[name]

    def with_class(
        self, added: ModelClass, text: np.ndarray | None, query: np.ndarray
    ) -> "ModelFile":
        """The same model with a class more, or with this class in the place of its namesake.

        Its linear classifier stays as it is; a new class has none yet.

        Args:
            added: the class.
            text: (D,) its text embedding; None if its linear classifier alone scores it.
            query: (D,) what its regions are retrieved with.
        """
        known = self.class_of(added.name) is not None
        classes = [added if c.name == added.name else c for c in self.classes]
        others = {name: vector for name, vector in self.text.items() if name != added.name}
        return replace(
            self,
            classes=classes if known else [*classes, added],
            text=others if text is None else others | {added.name: text},
            queries=self.queries | {added.name: query},
        )


def write_model(path: Path, model: ModelFile) -> None:
    """Write a model file."""
    tensors = {
        f"{network}/{name}": tensor
        for network, of_network in model.networks.items()
        for name, tensor in of_network.items()
    }
    tensors |= {f"weight/{name}": vector for name, vector in model.weights.items()}
    tensors |= {f"text/{name}": vector for name, vector in model.text.items()}
    tensors |= {f"query/{name}": vector for name, vector in model.queries.items()}
    tensors |= {f"text_tower/{name}": tensor for name, tensor in model.text_tower.items()}
    if len(model.merges):
        tensors["merges/"] = model.merges
    card = {
        "format": FORMAT,
        "config": model.config.model_dump(mode="json", exclude_unset=True),
        "temperature": model.temperature,
        "classes": [asdict(c) for c in model.classes],
        "categories": model.categories,
        "clip": model.clip,
    }
    write_tensors(path, tensors, model.identity | {"card": card})


def read_model(path: Path) -> ModelFile:
    """Read a model file.

    Raises:
        LpovodError: if the file is damaged, no model, or of another version of this software.
    """
    tensors, ident = read_tensors(path, STAGE)
    card = ident.pop("card")
    if card["format"] != FORMAT:
        raise LpovodError(
            f"{path} is a model file of format {card['format']}, expected {FORMAT}. Export it again"
        )
    try:
        config = Config.model_validate(card["config"])
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"]))
        raise LpovodError(
            f"{path} was made by version {ident['version']}, whose configuration this one does not "
            f"know ({key}). Export it again"
        ) from None
    parts: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in tensors.items():
        part, _, rest = name.partition("/")
        parts.setdefault(part, {})[rest] = tensor
    return ModelFile(
        config,
        card["temperature"],
        [ModelClass(**c) for c in card["classes"]],
        card["categories"],
        {network: parts[network] for network in ("proposal_network", "detector")},
        parts["weight"],
        parts["text"],
        ident,
        parts.get("query", {}),
        card["clip"],
        parts.get("text_tower", {}),
        parts.get("merges", {}).get("", np.empty(0, np.uint8)),
    )
