"""Functions as tasks of Ray, on a cluster or in processes of this machine (extra `ray`)."""

import logging
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from tlcli.errors import TlcliError, UsageError
from tlcli.reporter import Reporter

ENVIRONMENT = ("TLCLI_CACHE", "HF_HUB_OFFLINE", "HF_HOME", "TORCH_HOME")  # that a task on another node needs
CANCEL_SECONDS = 60  # tasks that run when the command is interrupted save their state


def check_ray() -> None:
    """Raise UsageError unless Ray is installed."""
    if find_spec("ray") is None:
        raise UsageError("Ray is not installed: pip install 'tlcli[ray]'")


@contextmanager
def ray_cluster() -> Iterator[list[int]]:
    """Connect to the cluster of RAY_ADDRESS or of `ray start` on this machine, else start one; yield the CPUs per node.

    A cluster that another program has started for itself is left alone, since it ends with that program. Ray sends no
    usage statistics, and its dashboard is off. Output of the tasks is not shown.
    """
    check_ray()
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray
    from joblib import cpu_count  # by affinity and control group

    logging.getLogger("ray").setLevel(logging.ERROR)
    options: dict[str, Any] = {"configure_logging": False, "log_to_driver": False}
    handler = signal.getsignal(signal.SIGTERM)
    named = os.environ.get("RAY_ADDRESS", "local") not in ("", "local")
    try:
        try:
            ray.init(**options, **({} if named else {"num_cpus": cpu_count(), "include_dashboard": False}))
        except ValueError:  # a cluster of `ray start` has its own number of CPUs
            ray.init(**options)
    except Exception as error:  # Ray raises a plain one if a node does not start in time
        raise TlcliError(f"cannot connect to Ray: {error}") from error
    signal.signal(signal.SIGTERM, handler)  # Ray's ends the process at once
    try:
        yield [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    finally:
        ray.shutdown()


def run_tasks(
    function: Callable[..., Any], inputs: Sequence[Any], reporter: Reporter, *, cpus: float, gpus: float, retries: int
) -> Iterator[tuple[int, Any]]:
    """Yield (index of its inputs, result) of each task as it finishes, inside `ray_cluster`.

    The function belongs to a module that the nodes can import. The result is the exception if a task fails, or Ray's if
    its process is killed more than `retries` times. If the caller stops, running tasks get a KeyboardInterrupt.
    """
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus for node in nodes):  # one may join, so wait
        reporter.note(f"no node of the Ray cluster has {cpus:g} CPUs and {gpus:g} GPUs; waiting for one")
    # a worker imports the module by name: nothing of this process is copied to it but the arguments and these variables
    environment = {"env_vars": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}}
    task = ray.remote(function).options(num_cpus=cpus, num_gpus=gpus, max_retries=retries, runtime_env=environment)
    pending = {task.remote(*args): i for i, args in enumerate(inputs)}
    try:
        while pending:
            (ref,), _ = ray.wait([*pending])
            index = pending.pop(ref)
            try:
                result = ray.get(ref)
            except ray.exceptions.RayError as error:
                result = getattr(error, "cause", error)  # what the task raised, if it has ended by itself
            yield index, result
    finally:
        for ref in pending:
            ray.cancel(ref)
        ray.wait([*pending], num_returns=len(pending), timeout=CANCEL_SECONDS)
