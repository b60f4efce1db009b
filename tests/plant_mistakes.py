"""Plants mistakes about devices, one by one, and lists which of them the device tests catch.

    PYTHONPATH=. python tests/plant_mistakes.py [FILE ...]

A `.to(device)` or `.cpu()` is left out, a new tensor is made on the CPU, or a function is told
"cpu". A few change nothing, such as a default's own value: those that are not caught have to be
looked at. Each is planted in a process of its own, in the code of the loaded functions.
"""

import ast
import inspect
import os
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import device_cases  # noqa: F401  what the tests need, imported once
import pytest
import torch

FILES = {
    "boxes": "trained or described or step",
    "crops": "crops or embedded",
    "views": "trained",
    "clip": "clip or embedded",
    "training": "trained",
    "model": "model",
    "retrieved_features": "described",
    "transfers": "described",
    "networks/pooling": "trained",
    "networks/rpn": "trained",
    "networks/proposal_network": "trained",
    "networks/proposal_inference": "found or computes",
    "networks/detector_inference": "described or computes",
    "stages/proposal_network": "trained",
    "stages/base_detector": "trained",
    "stages/proposals": "found",
    "stages/region_embeddings": "embedded",
    "stages/region_features": "described",
    "stages/small_clip/zero_shot": "clip",
    "apps/learn": "learned",
}
"""Below lpovod, with pytest's expression for the tests that reach them first."""

MAKERS = {"new_tensor": "tensor", "new_zeros": "zeros", "new_ones": "ones", "new_full": "full"}


def mistakes(source: str) -> Iterator[tuple[int, str, str]]:
    """Line of each mistake, what it is, and the source with it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            for replaced, text in _of_call(node):
                yield node.lineno, text, _replace(source, replaced, text)


def _of_call(call: ast.Call) -> Iterator[tuple[ast.expr, str]]:
    """The nodes of a call to replace, each with its replacement."""
    owner = call.func.value if isinstance(call.func, ast.Attribute) else None
    name = call.func.attr if isinstance(call.func, ast.Attribute) else ast.unparse(call.func)
    if owner is not None and name == "cpu":
        yield call, f"({ast.unparse(owner)})"
    if owner is not None and name == "to":
        yield from ((call, text) for text in _without_moving(call, ast.unparse(owner)))
        return
    if owner is not None and name in MAKERS:
        arguments = ", ".join(map(ast.unparse, [*call.args, *call.keywords]))
        dtype = "" if "dtype" in arguments else f", dtype={ast.unparse(owner)}.dtype"
        yield call, f"torch.{MAKERS[name]}({arguments}{dtype})"
    for argument in call.args:
        if ast.unparse(argument) in ("device", "self.device"):
            yield argument, "'cpu'"
    for keyword in call.keywords:
        if keyword.arg == "device":
            yield keyword.value, "'cpu'"


def _without_moving(call: ast.Call, owner: str) -> Iterator[str]:
    """A `.to` that keeps the dtype's part, or nothing, of what it did."""
    moved = [ast.unparse(value) for value in call.args]
    moved += [ast.unparse(k.value) for k in call.keywords if k.arg == "device"]
    if not moved or any(word in moved[0] for word in ("dtype", "torch.", "PRECISION", "precision")):
        return
    yield f"({owner})" if "device" in moved[0] else f"({owner}).to({moved[0]}.dtype)"


def _replace(source: str, node: ast.expr, text: str) -> str:
    lines = source.splitlines(keepends=True)
    assert node.end_lineno is not None and node.end_col_offset is not None
    start = sum(map(len, lines[: node.lineno - 1])) + node.col_offset
    end = sum(map(len, lines[: node.end_lineno - 1])) + node.end_col_offset
    return source[:start] + text + source[end:]


def functions(owner: Any, module: str, prefix: str = "") -> Iterator[tuple[str, FunctionType]]:
    """The functions of a module or class, below their wrappers, by name."""
    for name, value in vars(owner).items():
        value = getattr(value, "func", None) or getattr(value, "fget", None) or value
        if isinstance(value, type) and value.__module__ == module:
            yield from functions(value, module, f"{prefix}{name}.")
        elif callable(value):
            inner = inspect.unwrap(value)
            if isinstance(inner, FunctionType) and inner.__module__ == module:
                yield prefix + name, inner


def plant(file: str, source: str) -> None:
    """Give the loaded functions of a file the code of another source."""
    module = import_module(f"lpovod.{file.replace('/', '.')}")
    spoiled = ModuleType(module.__name__)
    spoiled.__dict__.update(__file__=module.__file__, __package__=module.__package__)
    exec(compile(source, str(module.__file__), "exec"), spoiled.__dict__)
    codes = {name: f.__code__ for name, f in functions(spoiled, module.__name__)}
    for name, function in functions(module, module.__name__):
        function.__code__ = codes[name]


def caught(file: str, source: str) -> bool:
    """Whether a device test fails with a mistake in a file."""
    child = os.fork()
    if child == 0:
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        plant(file, source)
        command = ["-xq", "-p", "no:cacheprovider", "-k", FILES[file], "tests/device_cases.py"]
        os._exit(pytest.main(command))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 1), f"{file}: pytest ended with {code}"
    return code == 1


def main(files: list[str]) -> None:
    torch.set_num_threads(1)
    found = [0, 0]
    for file in files:
        source = Path(f"lpovod/{file}.py").read_text()
        if caught(file, source):
            sys.exit(f"{file}: the tests fail without a mistake")
        for line, text, spoiled in sorted(mistakes(source)):
            outcome = caught(file, spoiled)
            found[outcome] += 1
            print(f"{'caught' if outcome else 'MISSED'}  {file}.py:{line}  {text}", flush=True)
    print(f"{found[1]} of {sum(found)} caught")


if __name__ == "__main__":
    main(sys.argv[1:] or list(FILES))
