"""Extraction on a cluster: python -m benchmarks.shards DATA [--small]

Images per second of `tlcli cache fill --engine ray` on two Ray nodes of one core each, against one such node, on
images of CIFAR-10 with EfficientNet-Lite0 in float32 and a cold cache. Each node is bound to a core of its own. The
start of the cluster and the plan are not counted; the start of the workers, and writing the entries, are. It needs a
machine with two idle cores.
"""

import os
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.figures import Measure, at_least, interleaved, ratios, table
from benchmarks.images import subset
from benchmarks.run import BACKBONES, alone, out_folder, parser, publish, publish_measures


@dataclass(frozen=True)
class Settings:
    """Sizes of the measurement. `train`, `test`: images per class (of ten)."""

    size: int = 224
    train: int = 1500
    test: int = 32
    shards: int = 60
    rounds: int = 2


SMALL = Settings(size=32, train=8, test=4, shards=2, rounds=1)
NODES = {"two nodes of one core": 2, "one node of one core": 1}
FORMATS = ("device.precision=fp32", "device.channels_last=true", "device.threads=1", "freeze.head_init=random")


def fill(root: str, nodes: int, size: int, shards: int) -> dict[str, Any]:
    """Return the images per second of a cluster with this number of nodes. Runs in a process of its own."""
    from ray.cluster_utils import Cluster

    from tlcli.cli import quiet_libraries
    from tlcli.cli.compose import compose_spec
    from tlcli.engine.session import session_for
    from tlcli.fill import complete, plan_file, read_plan, run_shards, write_plan
    from tlcli.reporter import Reporter

    quiet_libraries()
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    words = ("dataset=imagefolder", f"dataset.root='{root}'", f"image.size={size}", "freeze=head", "cache.mode=require")
    spec = compose_spec([*BACKBONES["efficientnet_lite0"], *words, *FORMATS])
    with tempfile.TemporaryDirectory(prefix="activations_") as folder:
        os.environ["TLCLI_CACHE"] = folder
        session = session_for(spec.cache)
        write_plan(spec, shards, session, Reporter())
        file = plan_file(session.store, spec, shards)
        plan, cores = read_plan(file), sorted(os.sched_getaffinity(0))
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        for node in range(nodes):
            os.sched_setaffinity(0, {cores[node % len(cores)]})  # the processes of the node inherit it
            cluster.add_node(num_cpus=1)
        os.sched_setaffinity(0, cores)
        os.environ["RAY_ADDRESS"] = cluster.address
        began = time.perf_counter()
        results = dict(run_shards(file, range(shards), session.store, Reporter(), on_ray=True))
        missing = complete(plan, session.store)
        seconds = time.perf_counter() - began
        cluster.shutdown()
    assert not missing, results
    return {"images_per_second": sum(entry.bounds[-1] for entry in plan.entries) / seconds}


def main(data: Path, out: Path, *, small: bool = False) -> list[Measure]:
    """Measure both clusters, print the table of speeds, and return the bar."""
    settings = SMALL if small else Settings()
    root = subset(data / "cifar10", out / "images", train=settings.train, test=settings.test)

    def speed(nodes: int) -> float:
        result = alone(fill, root=str(root), nodes=nodes, size=settings.size, shards=settings.shards)
        return float(result["images_per_second"])

    seen = interleaved({name: partial(speed, nodes) for name, nodes in NODES.items()}, settings.rounds)
    publish("shards", ["cluster", "images per second, median", "range"], table(seen), out, seen)
    two, one = NODES
    measures = [at_least(f"extraction, {two}, over {one}", 1.7, ratios(seen[two], seen[one]))]
    publish_measures("shards_measures", measures, out)
    return measures


if __name__ == "__main__":
    given = parser(__doc__).parse_args()
    main(given.data, out_folder(given.out, "shards"), small=given.small)
