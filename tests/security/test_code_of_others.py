"""Nothing in tlcli runs what a file brings, by the syntax tree of all of its modules; each rule finds an example."""

import ast
from pathlib import Path

import pytest

import tlcli

PACKAGE = Path(tlcli.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))

FORBIDDEN = {
    **dict.fromkeys(["eval", "exec", "compile", "__import__"], "runs code"),
    **dict.fromkeys(["pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve"], "unpickles"),
    **dict.fromkeys(["joblib.load", "numpy.lib.format.read_array", "pandas.read_pickle"], "unpickles"),
    **dict.fromkeys(["torch.jit.load", "torch.export.load", "torch.package.PackageImporter"], "runs code of a file"),
    **dict.fromkeys(
        ["torch.hub.load", "torch.hub.load_state_dict_from_url", "torch.hub.download_url_to_file"], "loads"
    ),
    **dict.fromkeys(["yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.unsafe_load_all"], "makes any object"),
    **dict.fromkeys(["yaml.full_load", "yaml.full_load_all", "yaml.Loader", "yaml.UnsafeLoader"], "makes any object"),
    **dict.fromkeys(["hydra.utils.instantiate", "hydra.utils.call", "hydra.utils.get_method"], "runs what it names"),
    **dict.fromkeys(["hydra.utils.get_class", "hydra.utils.get_object", "hydra.utils.get_static_method"], "imports"),
    **dict.fromkeys(["os.system", "os.popen", "os.execv", "os.execvp", "os.spawnv", "pty.spawn"], "starts programs"),
    **dict.fromkeys(["subprocess.getoutput", "subprocess.getstatusoutput"], "starts a shell"),
    **dict.fromkeys(["shutil.unpack_archive"], "extracts what it likes"),
    **dict.fromkeys(["tempfile.mktemp", "tempfile.gettempdir", "os.tmpnam"], "names a file in a place of all users"),
}
"""What may not be called, nor imported, with the reason. A module stands for all that is in it."""

EXCEPTIONS = {
    ("export.py", "torch.export.load"),  # an export is checked by loading the file that this process has written
    ("files.py", "yaml.load"),  # with libyaml's safe loader, for which yaml.safe_load has no argument
}

BELOW = {f"tempfile.{name}" for name in ("mkstemp", "mkdtemp", "NamedTemporaryFile", "TemporaryDirectory")} | {
    f"tempfile.{name}" for name in ("TemporaryFile", "SpooledTemporaryFile")
}
"""What has to be told `dir`: the system's place for temporary files is one of all users."""

MODES = {"chmod": 0, "os.chmod": 1, "os.fchmod": 1, "os.mkdir": 1, "os.makedirs": 1, "os.open": 2, "os.mkfifo": 1}
"""Calls with a mode, and the place of it among the arguments; as a method of Path it is one earlier."""


class Module(ast.NodeVisitor):
    """What a module's source has against the rules, a line each."""

    def __init__(self, source: str, name: str = "example.py") -> None:
        self.name = name
        self.found: list[str] = []
        self._means: dict[str, str] = {}
        tree = ast.parse(source)
        for node in ast.walk(tree):
            self._note_names(node)
        self.visit(tree)

    def _note_names(self, node: ast.AST) -> None:
        """What the names in this module stand for: `import torch as t` makes t.load torch.load."""
        if isinstance(node, ast.Import):
            self._means |= {
                a.asname or a.name.split(".")[0]: a.name if a.asname else a.name.split(".")[0] for a in node.names
            }
        elif isinstance(node, ast.ImportFrom) and node.module:
            self._means |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}

    def full(self, node: ast.expr) -> str:
        """A dotted name as it is outside of this module."""
        first, dot, rest = ast.unparse(node).partition(".")
        return self._means.get(first, first) + dot + rest

    def tell(self, node: ast.expr | ast.stmt, words: str) -> None:
        self.found.append(f"{self.name}:{node.lineno}: {words}")

    def forbid(self, node: ast.expr | ast.stmt, name: str) -> None:
        for known, why in FORBIDDEN.items():
            if (name == known or name.startswith(known + ".")) and (self.name, name) not in EXCEPTIONS:
                self.tell(node, f"{name} {why}")

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self.forbid(node, alias.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        for alias in node.names:
            self.forbid(node, f"{node.module}.{alias.name}")

    def visit_Attribute(self, node: ast.Attribute) -> None:
        """Passed on without a call is as bad: map(eval, ...)."""
        self.forbid(node, self.full(node))
        self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        if node.id not in self._means and isinstance(node.ctx, ast.Load):  # what was imported was looked at there
            self.forbid(node, node.id)

    def visit_Call(self, node: ast.Call) -> None:
        name, given = self.full(node.func), {k.arg: k.value for k in node.keywords}
        words = {key: ast.unparse(value) for key, value in given.items()}
        last = name.rpartition(".")[2]
        if name == "torch.load" and words.get("weights_only") != "True":
            self.tell(node, "torch.load without weights_only=True")
        if last in ("load", "fromfile") and name.startswith("numpy.") and "allow_pickle" in words:
            self.tell(node, f"{name} with allow_pickle")
        if last == "get_state_dict" and words.get("check_hash") != "True":
            self.tell(node, f"{name} without check_hash=True: published weights are compared with their digest")
        if words.get("shell", "False") != "False":
            self.tell(node, f"{name} with shell={words['shell']}")
        if name.endswith((".extractall", ".extract")) and words.get("filter") != "'data'":
            self.tell(node, f"{name} without filter='data'")
        if name in BELOW and "dir" not in words:
            self.tell(node, f"{name} without dir=")
        self._mode(node, name, given)
        self.generic_visit(node)

    def _mode(self, node: ast.Call, name: str, given: dict[str | None, ast.expr]) -> None:
        """A mode that lets everybody write, or that is not given in numbers where files are made."""
        method = name.rpartition(".")[2]
        place = MODES.get(name, MODES["chmod"] if method in ("chmod", "lchmod") else None)
        mode = given.get("mode")
        if mode is None and place is not None and place < len(node.args):
            mode = node.args[place]
        if isinstance(mode, ast.Constant) and isinstance(mode.value, int) and mode.value & 0o002:
            self.tell(node, f"{name} with mode {mode.value:#o}, which lets everybody write")
        if name == "os.umask":
            self.tell(node, "os.umask: the umask is the user's")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_no_module_runs_code_of_others_or_leaves_files_to_all(path: Path) -> None:
    assert Module(path.read_text(encoding="utf-8"), path.relative_to(PACKAGE).as_posix()).found == []


PLANTED = {
    "eval": "eval(text)",
    "exec": "exec(text)",
    "compile": "compile(text, 'f', 'exec')",
    "import by name": "__import__(name)",
    "pickle.loads by another name": "from pickle import loads as read\nread(data)",
    "dill": "import dill\ndill.load(file)",
    "joblib": "import joblib\njoblib.load(file)",
    "marshal": "import marshal\nmarshal.loads(data)",
    "shelve": "import shelve",
    "torch.load": "import torch\ntorch.load(file)",
    "torch.load of all": "import torch\ntorch.load(file, weights_only=False)",
    "torch.load by another name": "from torch import load as read\nread(file)",
    "torch.hub": "import torch\ntorch.hub.load(repository, name)",
    "weights without a digest": "weights.get_state_dict(progress=True)",
    "numpy.load": "import numpy as np\nnp.load(file, allow_pickle=True)",
    "yaml.load": "import yaml\nyaml.load(text, Loader=yaml.SafeLoader)",
    "yaml.unsafe_load": "from yaml import unsafe_load\nunsafe_load(text)",
    "instantiate": "from hydra.utils import instantiate\ninstantiate(config)",
    "get_class": "from hydra.utils import get_class",
    "os.system": "import os\nos.system(line)",
    "os.popen": "from os import popen\npopen(line)",
    "shell": "import subprocess\nsubprocess.run(line, shell=True)",
    "getoutput": "import subprocess\nsubprocess.getoutput(line)",
    "tar": "archive.extractall(folder)",
    "unpack_archive": "import shutil\nshutil.unpack_archive(file)",
    "mktemp": "import tempfile\ntempfile.mktemp()",
    "mkstemp": "import tempfile\ntempfile.mkstemp()",
    "temporary file": "import tempfile\ntempfile.TemporaryFile()",
    "chmod": "path.chmod(0o777)",
    "os.chmod": "import os\nos.chmod(path, 0o666)",
    "os.open": "import os\nos.open(path, os.O_CREAT, 0o666)",
    "mkdir": "path.mkdir(mode=0o777)",
    "umask": "import os\nos.umask(0)",
}
"""A line or two that break a rule, by what is in them."""


@pytest.mark.parametrize("source", PLANTED.values(), ids=PLANTED)
def test_each_rule_finds_its_example(source: str) -> None:
    assert Module(source).found


ALLOWED = {
    "weights with a digest": "weights.get_state_dict(check_hash=True)",
    "a method called eval": "network.eval()",
    "tensors alone": "import torch\ntorch.load(file, weights_only=True)",
    "plain values": "import yaml\nyaml.safe_load(text)",
    "JSON": "import json\njson.load(file)",
    "a program": "import subprocess\nsubprocess.run(['git', 'rev-parse', 'HEAD'])",
    "a tar with the data filter": "archive.extractall(folder, filter='data')",
    "a folder beside the output": "import tempfile\ntempfile.mkdtemp(dir=folder)",
    "a mode of the user's own": "path.chmod(0o640)",
    "a field of this name": "class Spec:\n    compile: bool",
    "patterns": "import re\nre.compile(text)",
}
"""What must not be mistaken for one of these."""


@pytest.mark.parametrize("source", ALLOWED.values(), ids=ALLOWED)
def test_what_is_sound_is_let_alone(source: str) -> None:
    assert Module(source).found == []


def test_an_exception_is_still_needed() -> None:
    """One that no module makes use of any more would let another one in."""
    used = set()
    for name, call in EXCEPTIONS:
        tree = ast.parse((PACKAGE / name).read_text(encoding="utf-8"))
        used |= {
            (name, call) for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == call
        }
    assert used == EXCEPTIONS
