"""Tasks of Ray: results as they finish, errors as results, no statistics sent, and Ray as an extra."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest

from tests.conftest import Notes
from tlcli.ray_tasks import ray_cluster, run_tasks
from tlcli.reporter import Reporter


def invert(number: float, folder: str) -> float:
    """Return 1 / number; 1 kills the process the first time, and 2 always."""
    file = Path(folder) / "killed"
    if number == 2 or (number == 1 and not file.exists()):
        file.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return 1 / number


@pytest.fixture
def ray_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Use a folder of Ray for one test; its path is short, because paths of sockets have at most 107 bytes."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        monkeypatch.setenv("RAY_TMPDIR", folder)
        yield Path(folder)


@pytest.mark.parametrize(("cpus", "gpus", "waits"), [(8, 0, False), (2, 1, False), (9, 0, True), (8, 1, True)])
def test_a_note_says_that_no_node_has_what_a_task_needs(cpus: int, gpus: int, waits: bool, monkeypatch) -> None:
    resources = [(True, {"CPU": 8.0}), (True, {"CPU": 2.0, "GPU": 1.0}), (False, {"CPU": 64.0, "GPU": 8.0})]
    nodes, reporter = [{"Alive": alive, "Resources": own} for alive, own in resources], Notes()
    monkeypatch.setitem(sys.modules, "ray", Mock(nodes=lambda: nodes))
    assert list(run_tasks(invert, [], reporter, cpus=cpus, gpus=gpus, retries=0)) == []
    note = f"no node of the Ray cluster has {cpus} CPUs and {gpus} GPUs; waiting for one"
    assert reporter.notes == [note] * waits


@pytest.mark.slow
@pytest.mark.usefixtures("ray_folder")
def test_tasks(tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    handler = signal.getsignal(signal.SIGTERM)
    with ray_cluster() as cpus:
        assert sum(cpus) >= 1 and signal.getsignal(signal.SIGTERM) is handler
        assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
        arguments = [(n, str(tmp_path)) for n in (4, 0, 1, 2)]
        results = dict(run_tasks(invert, arguments, Reporter(), cpus=1, gpus=0, retries=1))
        (index, first), *_ = run_tasks(invert, arguments[:1], Reporter(), cpus=1, gpus=0, retries=0)
    assert results[0] == 0.25 and results[2] == 1 and (index, first) == (0, 0.25)
    assert isinstance(results[1], ZeroDivisionError) and isinstance(results[3], ray.exceptions.WorkerCrashedError)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_folder")
def test_a_cluster_of_another_program_is_left_alone() -> None:
    ray = pytest.importorskip("ray")
    start = "import ray; print(ray.init(address='local', num_cpus=3, include_dashboard=False)['address']); input()"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", start], stdin=pipe, stdout=pipe, stderr=pipe, text=True) as other:
        assert other.stdout is not None
        address = other.stdout.readline().strip()
        with ray_cluster() as cpus:
            assert cpus == [len(os.sched_getaffinity(0))]
            assert ray.get_runtime_context().gcs_address != address
        other.communicate("\n")
    assert address and other.returncode == 0
