"""Captions of the small CLIP's training crops, and the vocabulary of its tokenizer."""

from __future__ import annotations

import gzip
from collections import Counter
from itertools import pairwise, product
from pathlib import Path

import numpy as np

from lpovod.artifacts import atomic
from lpovod.miniature.pictograms import CLASSES

# ---------------------------------------------------------------------------------- captions

BACKGROUND = len(CLASSES)  # caption class of crops without an object

TEMPLATES = (
    "{}",
    "{}",  # twice, since it is the prompt at test time
    "a {}",
    "the {}",
    "a photo of a {}",
    "a drawing of a {}",
    "a picture of the {}",
    "a part of a {}",
)

BACKGROUND_WORDS = ("background", "nothing", "an empty place", "lines", "a blurred ground")

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (205, 40, 45),
    "orange": (235, 140, 40),
    "yellow": (225, 220, 60),
    "green": (60, 175, 60),
    "cyan": (60, 205, 205),
    "blue": (50, 70, 200),
    "purple": (130, 45, 170),
    "pink": (235, 120, 190),
    "brown": (115, 75, 45),
    "black": (35, 35, 35),
    "white": (228, 228, 228),
    "grey": (130, 130, 130),
}

COLOUR_VALUES = np.array(list(COLOURS.values()), dtype=np.float64)


def caption(class_index: int, colour: int | None, template: int) -> str:
    """The text of a crop; `colour` is an index of `COLOURS`, None leaves it out."""
    if class_index == BACKGROUND:
        return BACKGROUND_WORDS[template % len(BACKGROUND_WORDS)]
    name = CLASSES[class_index]
    if colour is not None:
        name = f"{list(COLOURS)[colour]} {name}"
    return TEMPLATES[template].format(name)


def all_captions() -> list[str]:
    colours = [None, *range(len(COLOURS))]
    combinations = product(range(BACKGROUND + 1), colours, range(len(TEMPLATES)))
    return sorted({caption(*combination) for combination in combinations})


def learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent first, until each word is one token.

    Sennrich et al. 2016, algorithm 1, with ties broken by the alphabet.
    """
    pieces = {word: [*word[:-1], word[-1] + "</w>"] for word in words}
    merges = []
    while any(len(piece) > 1 for piece in pieces.values()):
        counts = Counter(pair for piece in pieces.values() for pair in pairwise(piece))
        pair = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(pair)
        pieces = {word: _merge(piece, pair) for word, piece in pieces.items()}
    return merges


def _merge(piece: list[str], pair: tuple[str, str]) -> list[str]:
    merged, position = [], 0
    while position < len(piece):
        if tuple(piece[position : position + 2]) == pair:
            merged.append(piece[position] + piece[position + 1])
            position += 2
        else:
            merged.append(piece[position])
            position += 1
    return merged


def write_vocabulary(path: Path) -> None:
    """Merges in the format of open_clip's `SimpleTokenizer`: gzip, a header, no final newline."""
    words = sorted({word for text in all_captions() for word in text.split()})
    lines = ["#version: 0.2", *(" ".join(pair) for pair in learn_merges(words))]
    with atomic(path) as partial:
        partial.write_bytes(gzip.compress("\n".join(lines).encode(), mtime=0))
