"""The order of the layers, held by reading the imports: they run downward only."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import tlcli

PACKAGE = Path(tlcli.__file__).parent
LAYERS = [
    {"errors", "interrupts", "registry", "reporter", "text", "__init__"},
    {"files", "specs"},
    {"store"},
    {"device"},
    {"models", "data"},
    {"transfer"},
    {"engine"},
    {"runs"},
    {"train", "evaluate", "check", "predict", "export"},
    {"cli"},
    {"__main__"},
]
"""From the bottom up. A module may import from layers below its own, and from its own package."""
MODULES = sorted(PACKAGE.rglob("*.py"))


def layer(top: str) -> int:
    return next(i for i, names in enumerate(LAYERS) if top in names)


def top_of(dotted: str) -> str:
    """`engine` for tlcli.engine.trainer; `__init__` for tlcli itself."""
    parts = dotted.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports(path: Path) -> Iterator[str]:
    """The dotted names that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield str(node.module)
            yield from (f"{node.module}.{a.name}" for a in node.names if node.module in ("tlcli", "tlcli.runs"))


def own_top(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_imports_run_downward(path: Path) -> None:
    own = own_top(path)
    for name in imports(path):
        if own == "__init__":  # tlcli.load_run, whose import waits until it is called
            assert not name.startswith("tlcli") or name.startswith("tlcli.runs.load")
        elif name.split(".")[0] == "tlcli":
            other = top_of(name)
            if other in set().union(*LAYERS) and other != own:
                assert layer(other) < layer(own), f"{own} imports {name}"


def test_every_module_has_a_layer() -> None:
    assert {own_top(path) for path in MODULES} <= set().union(*LAYERS)


def test_modules_import_in_no_circle() -> None:
    names = {path: "tlcli." + ".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in MODULES}
    graph = {names[path]: {n for n in imports(path) if n in names.values()} for path in MODULES}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join([*above, name])
        if name not in done:
            for other in graph[name]:
                visit(other, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("library", ["hydra", "omegaconf", "argparse"])
def test_only_the_command_line_knows(library: str) -> None:
    knowing = {own_top(path) for path in MODULES if any(n.split(".")[0] == library for n in imports(path))}
    assert knowing <= {"cli"}


def test_rich_is_for_the_command_line_alone() -> None:
    assert {own_top(p) for p in MODULES if any(n.split(".")[0] == "rich" for n in imports(p))} == {"cli"}


LIGHT = [
    "tlcli",
    "tlcli.cli",
    "tlcli.specs",
    "tlcli.store",
    "tlcli.export",
    "tlcli.cli.doctor",
    "tlcli.engine.optimizers",
    "tlcli.engine.schedule",
    "tlcli.transfer.freeze",
    "tlcli.models.backbones",
    "tlcli.data.listing",
    "tlcli.data.sources",
    "tlcli.data.augment",
    "tlcli.runs.index",
    "tlcli.runs.leaderboard",
]


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_leave_torch_out(module: str) -> None:
    code = f"import sys, {module}; print([m for m in ('torch', 'sklearn', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
