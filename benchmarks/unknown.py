"""Are images of unknown classes told from known ones: python -m benchmarks.unknown DATA

DATA has cifar10/{train,test}/CLASS/*. Three runs with default settings know five classes of CIFAR-10 each, from 500
images per class. The area under the ROC curve (AUROC) of the test images of the five classes against those of the other
five compares four scores: the one of `tlcli predict`, which is energy and distance, the energy of the logits alone, the
largest probability, and the similarity to the five nearest training images. A run whose folder exists is not trained
again.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch.nn import functional as F

from benchmarks.run import out_folder, parser, publish, tlcli_train

SPLITS = {
    "first five": "airplane,automobile,bird,cat,deer",
    "every second": "airplane,bird,deer,frog,ship",
    "vehicles and horse": "airplane,automobile,horse,ship,truck",
}
SCORE = "energy and distance"
TRAIN, NEIGHBORS, TEST = 500, 300, 200  # images per class: of the run, for the nearest neighbors, and of the test
NEAREST = 5
SAMPLES = 1000  # of the bootstrap


def files(data: Path, split: str, classes: list[str], n: int) -> list[str]:
    """Return the paths of the first n images of each class."""
    return [str(path) for name in classes for path in sorted((data / "cifar10" / split / name).iterdir())[:n]]


def scores(run: Path, known: list[str], unknown: list[str], train: list[str]) -> dict[str, np.ndarray]:
    """Return four scores (known, then unknown images), each higher for images that look unknown."""
    from tlcli.embed import Embedder
    from tlcli.engine.metrics import energy
    from tlcli.predict import Predictor
    from tlcli.runs.load import load_run
    from tlcli.specs import Precision
    from tlcli.store import Store, cache_dir
    from tlcli.transfer.contract import linear_head

    cpu, store, images = torch.device("cpu"), Store(cache_dir()), [*known, *unknown]
    predictions = list(Predictor(load_run(run), cpu, store).predict(images, total=len(images)))
    embedder = Embedder(load_run(run), cpu, store, Precision.auto, None)
    rows: list[Any] = [row for _, _, row in embedder.embed([*train, *images], total=len(train) + len(images))]
    x = torch.stack(rows)
    loaded = load_run(run)
    head = linear_head(loaded.classifier)
    assert head is not None
    with torch.inference_mode():
        logits = head(x[len(train) :])
    x = F.normalize(x - x[: len(train)].mean(dim=0))
    nearest = (x[len(train) :] @ x[: len(train)].T).topk(min(NEAREST, len(train))).values.mean(dim=1)
    return {
        SCORE: np.array([p.unknown_score for p in predictions]),
        "energy": energy(logits).numpy(),
        "largest probability": np.array([-p.top[0][1] for p in predictions]),
        "nearest training images": -nearest.numpy(),
    }


def main(words: list[str]) -> None:
    """Train what is missing, and print the table."""
    given = parser(__doc__).parse_args(words)
    out, generator = out_folder(given.out, "unknown"), np.random.default_rng(0)
    n_train, n_near, n_test = (4, 4, 4) if given.small else (TRAIN, NEIGHBORS, TEST)
    areas: dict[str, list[list[float]]] = {}  # by score: per split the value and those of the bootstrap
    for name, classes in SPLITS.items():
        run, own = out / name.replace(" ", "_"), classes.split(",")
        others = sorted({path.name for path in (given.data / "cifar10/test").iterdir()}.difference(own))
        if not (run / "test.json").exists():
            small = ("epochs=1", "image.size=32", "dataset.val_fraction=0.25") if given.small else ()
            limits = (f"dataset.train_per_class={n_train}", f"dataset.test_per_class={n_test}")
            root = f"dataset.root='{given.data / 'cifar10'}'"
            tlcli_train(run, "dataset=imagefolder", root, f"dataset.classes=[{classes}]", *limits, *small)
        groups = [files(given.data, "test", group, n_test) for group in (own, others)]
        found = scores(run, *groups, files(given.data, "train", own, n_near))
        n_known, n_unknown = map(len, groups)
        is_unknown = np.repeat([0, 1], [n_known, n_unknown])
        draws = [np.arange(len(is_unknown))]  # all images, then the samples of the bootstrap
        for _ in range(SAMPLES):
            known, unknown = (generator.integers(n, size=n) for n in (n_known, n_unknown))
            draws.append(np.concatenate([known, n_known + unknown]))
        for score, values in found.items():
            areas.setdefault(score, []).append([float(roc_auc_score(is_unknown[i], values[i])) for i in draws])

    def cell(values: np.ndarray) -> str:
        low, high = np.quantile(values[1:], [0.025, 0.975])
        return f"{values[0]:.3f} ({low:.3f} to {high:.3f})"

    tables = {score: np.array(by_split) for score, by_split in areas.items()}
    rows = [[score, *map(cell, by_split), cell(by_split.mean(axis=0))] for score, by_split in tables.items()]
    gain = tables[SCORE] - tables["largest probability"]
    rows.append([f"{SCORE} above largest probability", *map(cell, gain), cell(gain.mean(axis=0))])
    publish("unknown", ["AUROC (95 %)", *SPLITS, "mean"], rows, out)


if __name__ == "__main__":
    main(sys.argv[1:])
