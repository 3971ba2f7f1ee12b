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
}  # what may not be called, nor imported, with the reason; a module stands for all that is in it

EXCEPTIONS = {
    ("export.py", "torch.export.load"),  # an export is checked by loading the file that this process has written
    ("files.py", "yaml.load"),  # with libyaml's safe loader, for which yaml.safe_load has no argument
}

TEMP = "mkstemp mkdtemp NamedTemporaryFile TemporaryDirectory TemporaryFile SpooledTemporaryFile"
BELOW = {
    f"tempfile.{name}" for name in TEMP.split()
}  # must be told `dir`: the system's folder for temporary files is one of all users

MODES = {"chmod": 0, "os.chmod": 1, "os.fchmod": 1, "os.mkdir": 1, "os.makedirs": 1, "os.open": 2, "os.mkfifo": 1}
# calls with a mode, and the place of it among the arguments; as a method of Path it is one earlier


def problems(source: str, module: str = "example.py") -> list[str]:
    """Return what a module's source has against the rules, a line each."""
    found, means, nodes = [], dict[str, str](), list(ast.walk(ast.parse(source)))

    def full(node: ast.expr) -> str:
        """Return a dotted name with import aliases resolved: after `import torch as t`, t.load is torch.load."""
        first, dot, rest = ast.unparse(node).partition(".")
        return means.get(first, first) + dot + rest

    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                means[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom):
            means |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in nodes:
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):  # passed on without a call is as bad: map(eval, ...)
            names = [full(node)]
        elif isinstance(node, ast.Name) and node.id not in means and isinstance(node.ctx, ast.Load):
            names = [node.id]
        for name in names:
            for known, why in FORBIDDEN.items():
                if (name == known or name.startswith(known + ".")) and (module, name) not in EXCEPTIONS:
                    found.append(f"{node.lineno}: {name} {why}")
        if not isinstance(node, ast.Call):
            continue
        name, given = full(node.func), {k.arg: k.value for k in node.keywords}
        words, last = {key: ast.unparse(value) for key, value in given.items()}, name.rpartition(".")[2]
        place = MODES.get(name, MODES["chmod"] if last in ("chmod", "lchmod") else len(node.args))
        mode = given.get("mode", node.args[place] if place < len(node.args) else None)
        rules = {
            "torch.load without weights_only": name == "torch.load" and words.get("weights_only") != "True",
            "allow_pickle": last in ("load", "fromfile") and name.startswith("numpy.") and "allow_pickle" in words,
            "no check_hash=True": last == "get_state_dict" and words.get("check_hash") != "True",
            "shell": words.get("shell", "False") != "False",
            "no filter='data'": name.endswith((".extractall", ".extract")) and words.get("filter") != "'data'",
            "no dir=": name in BELOW and "dir" not in words,
            "lets everybody write": isinstance(mode, ast.Constant) and isinstance(mode.value, int) and mode.value & 2,
            "the umask is the user's": name == "os.umask",
        }
        found += [f"{node.lineno}: {name}: {rule}" for rule, broken in rules.items() if broken]
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_no_module_runs_code_of_others_or_leaves_files_to_all(path: Path) -> None:
    assert problems(path.read_text(encoding="utf-8"), path.relative_to(PACKAGE).as_posix()) == []


PLANTED = {
    "eval": "eval(text)",
    "pickle.loads by another name": "from pickle import loads as read\nread(data)",
    "marshal": "import marshal\nmarshal.loads(data)",
    "torch.load": "import torch\ntorch.load(file)",
    "torch.load by another name": "from torch import load as read\nread(file)",
    "torch.hub": "import torch\ntorch.hub.load(repository, name)",
    "weights without a digest": "weights.get_state_dict(progress=True)",
    "numpy.load": "import numpy as np\nnp.load(file, allow_pickle=True)",
    "yaml.load": "import yaml\nyaml.load(text, Loader=yaml.SafeLoader)",
    "instantiate": "from hydra.utils import instantiate\ninstantiate(config)",
    "os.system": "import os\nos.system(line)",
    "shell": "import subprocess\nsubprocess.run(line, shell=True)",
    "tar": "archive.extractall(folder)",
    "unpack_archive": "import shutil\nshutil.unpack_archive(file)",
    "mkstemp": "import tempfile\ntempfile.mkstemp()",
    "chmod": "path.chmod(0o777)",
    "os.open": "import os\nos.open(path, os.O_CREAT, 0o666)",
    "mkdir": "path.mkdir(mode=0o777)",
    "umask": "import os\nos.umask(0)",
}  # lines that break a rule


ALLOWED = {
    "weights with a digest": "weights.get_state_dict(check_hash=True)",
    "a method called eval": "network.eval()",
    "a program": "import subprocess\nsubprocess.run(['git', 'rev-parse', 'HEAD'])",
    "a tar with the data filter": "archive.extractall(folder, filter='data')",
    "a folder beside the output": "import tempfile\ntempfile.mkdtemp(dir=folder)",
    "a field of this name": "class Spec:\n    compile: bool",
}  # and lines that must not be mistaken for these


@pytest.mark.parametrize("name", [*PLANTED, *ALLOWED])
def test_each_rule_finds_its_example_and_nothing_sound(name: str) -> None:
    assert bool(problems((PLANTED | ALLOWED)[name])) == (name in PLANTED)


def test_an_exception_is_still_needed() -> None:
    for name, call in EXCEPTIONS:
        assert f"{call}(" in (PACKAGE / name).read_text(encoding="utf-8")
