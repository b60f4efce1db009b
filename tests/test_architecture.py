"""The rooms of the house: what may import what, read off the imports themselves."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOMS = (
    {
        "lpovod",
        "exceptions",
        "progress",
        "yaml_keys",
        "source_digest",
        "overlaps",
        "schedule",
        "catalogue",
    }
    | {"epilogue"},
    {"artifacts", "miniature", "published"},
    {"config"},
    {"formats"},
    {"boxes", "torchvision_ops", "crops", "distributed", "shared_ranks", "views", "training"}
    | {"precision", "transfers", "devices"},
    {"networks", "measures", "drawing", "pages"},
    {"importers"},
    {"clip"},
    {"search", "scoring", "operations", "sources", "model", "text_tower"}
    | {"retrieval", "retrieved_features", "probe"},
    {"command_line", "launcher"},
    {"stages"},
    {"apps"},
)
"""From the ground up (docs/architecture.md). A room imports from itself and from those below."""

LIGHT = ("formats", "measures", "config", "miniature")
OF_FAISS = {"formats.index", "search"}


@cache
def imports() -> dict[str, set[str]]:
    """For every module of the library, by its name below lpovod, what it imports of it."""
    return {_name(path): _imports(path) for path in sorted(Path("lpovod").rglob("*.py"))}


def _name(path: Path) -> str:
    parts = [*path.parts[1:-1], path.stem]
    return ".".join(part for part in parts if part != "__init__") or "lpovod"


def _imports(path: Path) -> set[str]:
    known = {_name(p) for p in Path("lpovod").rglob("*.py")}
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lpovod":
            module = (node.module or "").removeprefix("lpovod").removeprefix(".")
            inner = {f"{module}.{a.name}".removeprefix(".") for a in node.names} & known
            names |= inner or {module or "lpovod"}
        if isinstance(node, ast.Import):
            names |= {a.name[7:] for a in node.names if a.name.startswith("lpovod.")}
    return names


def _third_party(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
    return names


def _room(module: str) -> int:
    return next(n for n, room in enumerate(ROOMS) if module.split(".")[0] in room)


def test_every_module_has_a_room():
    known = set().union(*ROOMS)
    assert {module.split(".")[0] for module in imports()} <= known


def test_no_import_runs_upward():
    upward = [(a, b) for a, inner in imports().items() for b in inner if _room(b) > _room(a)]
    assert upward == []


def test_no_stage_imports_a_stage():
    def stage(module: str) -> str:
        return module.split(".")[1] if "." in module else ""

    crossing = [
        (a, b)
        for a, inner in imports().items()
        for b in inner
        if b.split(".")[0] == "stages" and (a.split(".")[0] != "stages" or stage(a) != stage(b))
    ]
    assert crossing == []


def test_nothing_but_the_command_line_and_other_apps_imports_the_apps():
    crossing = [
        (a, b)
        for a, inner in imports().items()
        for b in inner
        if b.startswith("apps.") and not a.startswith("apps.")
    ]
    assert crossing == []
    scripts = [p for p in Path("workflow_scripts").glob("*.py") if "lpovod.apps" in p.read_text()]
    assert scripts == []


def test_no_modules_import_each_other():
    def reach(start: str) -> set[str]:
        seen, waiting = set(), list(imports()[start])
        while waiting:
            module = waiting.pop()
            if module not in seen:
                seen.add(module)
                waiting += imports().get(module, ())
        return seen

    assert [module for module in imports() if module in reach(module)] == []


def test_the_light_rooms_import_neither_torch_nor_faiss():
    heavy = [
        path
        for path in Path("lpovod").rglob("*.py")
        if _name(path).split(".")[0] in LIGHT
        and _third_party(path) & {"torch", "torchvision", "open_clip", "faiss"}
        and _name(path) not in OF_FAISS
    ]
    assert heavy == []
    of_faiss = {_name(p) for p in Path("lpovod").rglob("*.py") if "faiss" in _third_party(p)}
    assert of_faiss == OF_FAISS


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        ("workflow_scripts.linear_probe", ("torch", "faiss")),
        ("workflow_scripts.pseudo_labels", ("torch",)),
        ("workflow_scripts.region_index", ("torch",)),
        ("workflow_scripts.check", ("torch", "faiss")),
        ("workflow_scripts.dataset", ("torch", "faiss")),
        ("workflow_scripts.report", ("torch", "faiss")),
        pytest.param(
            "workflow_scripts.base_detector", ("faiss", "torchvision"), marks=pytest.mark.slow
        ),
        pytest.param("workflow_scripts.region_features", ("faiss",), marks=pytest.mark.slow),
        # What rules/common.smk imports while the graph is built.
        ("lpovod.sources, lpovod.source_digest, lpovod.measures.ablations", ("torch", "faiss")),
        ("lpovod.epilogue", ("torch", "faiss")),
        ("lpovod.apps.main", ("torch", "faiss", "tyro", "numpy")),
    ],
)
def test_what_a_program_does_not_need_is_not_loaded(modules, absent):
    code = f"import sys, {modules}; print([n for n in {absent} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
