"""Does `tlcli rank` choose well: python -m benchmarks.ranking DATA [--rows FILE] [--tables] [--beside]

DATA is that of benchmarks.quality. The candidates are EfficientNet-Lite0, 1 and 2 at three image sizes, and two
ResNet-18s that are pretrained on five classes of CIFAR-10 each. The truth is the test accuracy of a run of `tlcli
train` per candidate, task and seed: the rows of benchmarks.quality, with the candidate as recipe. Then `tlcli rank`
ranks the candidates by the training images alone. The regret of its choice is the accuracy that the best candidate has
more. It is shown beside that of the largest network, of two scores from the literature and of chance.
"""

import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import quality, source_target
from benchmarks.run import alone, out_folder, parser, publish, tlcli_train

TASKS = ("cifar10_50", "mri_20", "textures", "aerial")
NETWORKS, SIZES = ("efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2"), (128, 160, 224)
PER_CLASS_AND_ALL = (50, 2000)  # most sampled images, as `tlcli rank` has them
LARGEST = "efficientnet_lite2 224"
PARTS = {
    "resnet18 of animals": "bird,cat,deer,dog,frog",
    "resnet18 of vehicles": "airplane,automobile,horse,ship,truck",
}
"""Classes of CIFAR-10 by the name of the ResNet-18 that is pretrained on them."""


def pretrain(name: str, data: Path, out: Path, small: bool) -> Path:
    """Return the run of a ResNet-18 that is pretrained on its part of CIFAR-10; train it if it is missing."""
    folder = out / "pretrained" / name.replace(" ", "_")
    if not (folder / "test.json").exists():
        words = (
            f"dataset.root='{data / 'cifar10'}'",
            f"dataset.classes=[{PARTS[name]}]",
            "dataset.train_per_class=500",
        )
        length = ("epochs=1", "image.size=32") if small else ("epochs=10",)
        tlcli_train(folder, *source_target.COMMON, *words, *source_target.SCRATCH, *length)
    return folder


def candidates(data: Path, out: Path, small: bool) -> dict[str, tuple[str, ...]]:
    """Return the overrides of each candidate by its name: a network and an image size."""
    sizes = (32, 64) if small else SIZES
    published = {f"{name} {size}": (f"backbone={name}", f"image.size={size}") for name in NETWORKS for size in sizes}
    own = {name: pretrain(name, data, out, small) for name in PARTS}
    size = 32 if small else 64
    return published | {
        f"{name} {size}": ("backbone=resnet18", f"backbone.weights='{run}'", f"image.size={size}")
        for name, run in own.items()
    }


# -- scores -----------------------------------------------------------------------------------------------------------


def score_all(root: str, overrides: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Return the candidate that `tlcli rank` chooses, its seconds, and three scores per candidate."""
    from tlcli.cli.compose import compose_spec
    from tlcli.engine import ranking
    from tlcli.engine.session import session_for
    from tlcli.reporter import Reporter

    taken: list[tuple[np.ndarray, np.ndarray]] = []
    choose_penalty = ranking.choose_penalty

    def keep_features(x: Any, y: Any, *rest: Any) -> Any:
        taken.append((x.numpy(), y.numpy()))
        return choose_penalty(x, y, *rest)

    ranking.choose_penalty = keep_features  # LogME and H-score need the features that the probe gets
    words, reporter = ["dataset=imagefolder", f"dataset.root='{root}'"], Reporter()
    sizes: dict[str, list[int]] = {}
    for name in overrides:  # a network and a size
        network, _, size = name.rpartition(" ")
        sizes.setdefault(network, []).append(int(size))
    specs = {network: compose_spec([*words, *overrides[f"{network} {own[0]}"][:-1]]) for network, own in sizes.items()}
    session, began = session_for(next(iter(specs.values())).cache), time.perf_counter()
    scores = [
        score
        for network, spec in specs.items()
        for score in ranking.score(network, spec, sizes[network], PER_CLASS_AND_ALL, session, reporter)
    ]
    seconds = time.perf_counter() - began
    by_name = {
        f"{score.backbone} {score.size}": {
            "accuracy": score.probe.accuracy,
            "logme": log_evidence(*features),
            "h": h_score(*features),
            "run_seconds": score.seconds,
        }
        for score, features in zip(scores, taken, strict=True)
    }
    choice = ranking.choose(scores)
    return {"seconds": seconds, "choice": f"{choice.backbone} {choice.size}", "scores": by_name}


def log_evidence(x: np.ndarray, y: np.ndarray) -> float:
    """Return LogME of features (N, D) and labels (N): the maximum log evidence of Bayesian linear regression per image.

    The mean over one-hot targets (You et al., LogME: practical assessment of pre-trained models, 2021, algorithm 1).
    """
    u, s, _ = np.linalg.svd(x.astype(np.float64), full_matrices=False)
    n, d = x.shape
    sigma, evidences = s**2, []
    for label in np.unique(y):
        target = (y == label).astype(np.float64)
        z2 = (u.T @ target) ** 2
        outside = max(target @ target - z2.sum(), 0.0)
        alpha = beta = 1.0
        for _ in range(100):
            gamma = (beta * sigma / (alpha + beta * sigma)).sum()
            m2 = (beta**2 * sigma * z2 / (alpha + beta * sigma) ** 2).sum()
            residual = (alpha**2 * z2 / (alpha + beta * sigma) ** 2).sum() + outside
            before, alpha, beta = alpha / beta, gamma / (m2 + 1e-12), (n - gamma) / (residual + 1e-12)
            if abs(alpha / beta - before) <= 1e-3 * before:
                break
        log_det = np.log(alpha + beta * sigma).sum() + (d - len(s)) * np.log(alpha)
        terms = d * np.log(alpha) + n * np.log(beta) - beta * residual - alpha * m2 - log_det - n * np.log(2 * np.pi)
        evidences.append(terms / (2 * n))
    return float(np.mean(evidences))


def h_score(x: np.ndarray, y: np.ndarray) -> float:
    """Return the H-score of features (N, D): the trace of cov(x)^-1 cov(E[x | y]) (Bao et al. 2019)."""
    x = x.astype(np.float64) - x.mean(axis=0)
    means = np.zeros_like(x)
    for label in np.unique(y):
        means[y == label] = x[y == label].mean(axis=0)
    return float(np.trace(np.linalg.pinv(np.cov(x, rowvar=False), rcond=1e-6) @ np.cov(means, rowvar=False)))


# -- table ------------------------------------------------------------------------------------------------------------


def largest(truth: Mapping[str, float]) -> str:
    """Return the name of the largest network at its largest size."""
    return LARGEST if LARGEST in truth else list(truth)[-3]


def regrets(truth: Mapping[str, float], found: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Return by method the regret of its choice, and the expected time of a run with it over that of the largest."""
    scores, best = found["scores"], max(truth.values())
    choices = {"tlcli rank": found["choice"], "the largest": largest(truth)}
    for name, key in (("most accurate probe", "accuracy"), ("LogME", "logme"), ("H-score", "h")):
        choices[name] = max(scores, key=lambda candidate: scores[candidate][key])
    seconds = {name: values["run_seconds"] for name, values in scores.items()}
    longest = seconds[choices["the largest"]]
    table = {name: (best - truth[choice], seconds[choice] / longest) for name, choice in choices.items()}
    chance = best - float(np.mean(list(truth.values()))), float(np.mean(list(seconds.values()))) / longest
    return table | {"chance": chance}


def best_within(
    share: float, truths: Sequence[Mapping[str, float]], found: Sequence[Mapping[str, Any]]
) -> list[tuple[float, float]]:
    """Return regret and time per task of the choices with the smallest mean regret, found by the test accuracies.

    Their runs take at most this share of the time of the largest, on average, or are the fastest if none do.
    """
    options = []
    for truth, ranked in zip(truths, found, strict=True):
        seconds = {name: ranked["scores"][name]["run_seconds"] for name in truth}
        longest = seconds[largest(truth)]
        options.append([(max(truth.values()) - truth[name], seconds[name] / longest) for name in truth])
    limit = max(share * len(options), sum(min(time for _, time in own) for own in options))
    fast = [choice for choice in product(*options) if sum(time for _, time in choice) <= limit]
    return list(min(fast, key=lambda choice: sum(regret for regret, _ in choice)))


def main(words: Sequence[str]) -> None:
    """Run what has no row yet, and print the tables."""
    command = parser(__doc__)
    command.add_argument("--rows", type=Path, help="file of the rows (default: quality.jsonl in the folder)")
    command.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    command.add_argument("--tables", action="store_true", help="train nothing; rank, and print the tables")
    command.add_argument("--beside", action="store_true", help="record no times of runs")
    given = command.parse_args(words)
    out = out_folder(given.out, "ranking")
    file, overrides = given.rows or out / "quality.jsonl", candidates(given.data, out, given.small)
    if not given.tables:
        for seed in given.seeds:
            for name, own in overrides.items():
                recipe = quality.Recipe(name, overrides=own, small=given.small)
                quality.measure(recipe, given.data, out, file, [seed], TASKS, given.beside)
    rows = quality.read(file)
    accuracies, found, cost = {}, {}, []
    for task in TASKS:
        own_rows = {
            name: [r["accuracy"] for r in rows if (r["task"], r["recipe"]) == (task, name)] for name in overrides
        }
        accuracies[task] = {name: float(np.mean(values)) for name, values in own_rows.items() if values}
        assert accuracies[task].keys() == overrides.keys(), f"{task}: rows are missing"
        with tempfile.TemporaryDirectory(prefix="activations_") as cache:
            os.environ["TLCLI_CACHE"] = cache
            found[task] = alone(score_all, root=str(quality.make(task, given.data, 0, out)), overrides=overrides)
        total = sum(values["run_seconds"] for values in found[task]["scores"].values())
        cost.append(
            [task, f"{found[task]['seconds']:.0f} s", f"{total:.0f} s", f"{found[task]['seconds'] / total:.3f}"]
        )
    cells = [
        [name, *(f"{accuracies[t][name]:.3f}, {found[t]['scores'][name]['accuracy']:.3f}" for t in TASKS)]
        for name in overrides
    ]
    publish("candidates", ["candidate: accuracy after training, of the probe", *TASKS], cells, out)
    by_task = [regrets(accuracies[task], found[task]) for task in TASKS]
    name = "the test accuracies, within a third of the time"
    oracle = best_within(1 / 3, [accuracies[t] for t in TASKS], [found[t] for t in TASKS])
    by_task = [{**values, name: own} for values, own in zip(by_task, oracle, strict=True)]
    lines = []
    for method in by_task[0]:
        points, times = zip(*(values[method] for values in by_task), strict=True)
        mean = f"{100 * np.mean(points):.1f}", f"{np.mean(times):.2f}"
        lines.append([method, *(f"{100 * regret:.1f}" for regret in points), *mean])
    publish("regret", ["choice by", *TASKS, "mean regret, points", "time of a run over the largest's"], lines, out)
    publish("cost", ["task", "tlcli rank", "runs of all candidates, expected", "ratio"], cost, out)


if __name__ == "__main__":
    main(sys.argv[1:])
