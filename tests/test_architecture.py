"""The layers of the package, read from its imports: they run downward, and libraries stay where they belong."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import tlcli
from tlcli.specs import HOMES

PACKAGE = Path(tlcli.__file__).parent
LAYERS = [
    {"errors", "interrupts", "reporter", "text"},
    {"files", "locks", "specs"},
    {"store", "ranks", "ray_tasks"},
    {"device"},
    {"data", "models"},
    {"transfer"},
    {"engine"},
    {"runs"},
    {"check", "evaluate", "export", "predict", "train"},
    {"embed", "fill", "tune"},
    {"cli"},
    {"__init__", "__main__"},
]
"""From the bottom up. A module may import from layers below its own, and from its own package."""
LIGHT = {
    "tlcli",
    "tlcli.cli",
    "tlcli.cli.cache",
    "tlcli.cli.doctor",
    "tlcli.export",
    "tlcli.locks",
    "tlcli.store",
    "tlcli.runs.index",
    "tlcli.runs.leaderboard",
}
LIGHT |= set(HOMES.values()) | {"tlcli.data.listing", "tlcli.runs.run_dir", "tlcli.specs"}


def imports(path: Path) -> set[str]:
    """Return the dotted names of all modules that a file imports."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


IMPORTS = {module_name(path): imports(path) for path in PACKAGE.rglob("*.py")}
GRAPH = {
    module: {name for name in names & IMPORTS.keys() if not module.startswith(f"{name}.")}  # its package comes first
    for module, names in IMPORTS.items()
}


def layer(module: str) -> int:
    top = [*module.split("."), "__init__"][1]
    return next(i for i, names in enumerate(LAYERS) if top in names)


def test_imports_run_downward() -> None:
    for module, names in GRAPH.items():
        for name in names:
            is_within = name.split(".")[1:2] == module.split(".")[1:2]
            assert is_within or layer(name) < layer(module), f"{module} imports {name}"


def test_imports_have_no_cycles() -> None:
    TopologicalSorter(GRAPH).prepare()  # raises CycleError


@pytest.mark.parametrize("library", ["argparse", "hydra", "omegaconf", "rich"])
def test_libraries_of_the_command_line(library: str) -> None:
    users = {module for module, names in IMPORTS.items() if library in {name.split(".")[0] for name in names}}
    assert users and all(module.startswith("tlcli.cli") for module in users)


def test_light_modules_import_without_torch() -> None:
    """One process imports them one after the other."""
    code = "import sys\n"
    for module in sorted(LIGHT):
        code += f"import {module}\nassert not {{'torch', 'sklearn', 'matplotlib'}} & sys.modules.keys(), '{module}'\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
