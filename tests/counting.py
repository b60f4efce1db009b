"""Counts of work: the calls of a function, which does its work all the same."""

from collections.abc import Callable
from typing import Any

import pytest


def count(
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    size: Callable[..., int] = lambda *arguments: 1,
) -> list[int]:
    """Wrap a function for one test; the list grows by the size of each call.

    Args:
        monkeypatch: puts the function back.
        owner: class or module of the function.
        name: of the function.
        size: of a call, from its positional arguments.
    """
    work, calls = getattr(owner, name), []

    def counted(*arguments: Any, **named: Any) -> Any:
        calls.append(size(*arguments))
        return work(*arguments, **named)

    monkeypatch.setattr(owner, name, counted)
    return calls
