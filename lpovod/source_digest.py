"""What a program's code means: a digest of all modules it imports, without comments.

A stage is stale when the meaning of its code has changed, not its bytes: a comment, a docstring,
another layout of the lines or a touched file changes nothing. The modules are derived from the
imports, so no list has to be kept. Used while the workflow's graph is built: nothing heavy here.
"""

import ast
import hashlib
from functools import cache
from pathlib import Path

PACKAGES = ("lpovod", "workflow_scripts")

NEUTRAL = frozenset(
    {
        "lpovod.progress",  # what is printed
        "lpovod.exceptions",  # how errors are worded
        "lpovod.catalogue",  # addresses; digests of what they hold are params of their own
        "lpovod.config",  # values of the settings are params of their own
        "workflow_scripts",  # how a command line becomes a call
    }
)
"""Modules that shape no result; what they import does not count on their account."""


def source_digest(script: Path, root: Path = Path()) -> str:
    """Digest of the meaning of a program and of every module of this project that it imports.

    Args:
        script: the program, relative to `root`.
        root: the project's folder.
    """
    meanings = sorted(f"{path} {_meaning(root / path)}" for path in source_files(script, root))
    return hashlib.sha256("\n".join(meanings).encode()).hexdigest()[:16]


def source_files(script: Path, root: Path = Path()) -> set[Path]:
    """The files that `source_digest` is of, relative to `root`."""
    files, waiting = set(), [Path(script)]
    while waiting:
        path = waiting.pop()
        if path not in files:
            files.add(path)
            waiting += [m for m in _imports(root / path, root) if m not in files]
    return files


def _imports(path: Path, root: Path) -> list[Path]:
    ours = [n for n in _read(path, path.stat().st_mtime_ns)[0] if n not in NEUTRAL]
    return [file for name in ours if (file := _file(name, root)) is not None]


def _meaning(path: Path) -> str:
    return _read(path, path.stat().st_mtime_ns)[1]


@cache
def _read(path: Path, mtime: int) -> tuple[list[str], str]:
    """What a file imports of this project, and the digest of its meaning; read once for all."""
    tree = ast.parse(path.read_text())
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            # What is imported from a package may be a module or a name in it.
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        if isinstance(body := getattr(node, "body", None), list):
            node.body = [s for s in body if not _is_docstring(s)]  # type: ignore[attr-defined]
    ours = [name for name in names if name.split(".")[0] in PACKAGES]
    return ours, hashlib.sha256(ast.dump(tree).encode()).hexdigest()


def _file(module: str, root: Path) -> Path | None:
    path = Path(*module.split("."))
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if (root / candidate).is_file():
            return candidate
    return None


def _is_docstring(statement: ast.AST) -> bool:
    """Strings that are statements: docstrings, and those beside constants."""
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )
