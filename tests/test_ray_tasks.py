"""Tasks of Ray: results as they finish, errors as results, no statistics sent, and Ray as an extra."""

import os
import signal
from pathlib import Path

import pytest

from tlcli.ray_tasks import ray_cluster, run_tasks


def invert(number: float, folder: str) -> float:
    """Return 1 / number; 1 kills the process the first time, and 2 always."""
    file = Path(folder) / "killed"
    if number == 2 or (number == 1 and not file.exists()):
        file.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return 1 / number


@pytest.mark.slow
def test_tasks(tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    handler = signal.getsignal(signal.SIGTERM)
    with ray_cluster() as cpus:
        assert sum(cpus) >= 1 and signal.getsignal(signal.SIGTERM) is handler
        assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
        arguments = [(n, str(tmp_path)) for n in (4, 0, 1, 2)]
        for _ in range(3):
            (tmp_path / "killed").unlink(missing_ok=True)
            results = dict(run_tasks(invert, arguments, cpus=1, gpus=0, max_retries=1))
            if not isinstance(results[2], ray.exceptions.LocalRayletDiedError):  # a race in Ray, on a busy machine
                break
        (index, first), *_ = run_tasks(invert, arguments[:1], cpus=1, gpus=0, max_retries=0)
    assert results[0] == 0.25 and results[2] == 1 and (index, first) == (0, 0.25)
    assert isinstance(results[1], ZeroDivisionError) and isinstance(results[3], ray.exceptions.WorkerCrashedError)
