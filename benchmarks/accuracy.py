"""Accuracy for the time spent, with default settings: python -m benchmarks.accuracy DATA

DATA has hymenoptera/{train,val}/CLASS/* and cifar10/{train,test}/CLASS/*. Each row is one command; its test split is
read once.
"""

import sys
import tempfile
from pathlib import Path

from benchmarks.run import publish, tlcli_train

JOBS = {
    "digits": (),
    "hymenoptera, `freeze=head`": ("dataset=imagefolder", "dataset.root='{data}/hymenoptera'", "freeze=head"),
    "hymenoptera": ("dataset=imagefolder", "dataset.root='{data}/hymenoptera'"),
    "CIFAR-10, 500 images per class, `image.size=128`": (
        "dataset=imagefolder",
        "dataset.root='{data}/cifar10'",
        "dataset.train_per_class=500",
        "image.size=128",
    ),
}


def main(data: Path) -> None:
    """Run each job once and print the table."""
    out = Path(tempfile.mkdtemp(prefix="accuracy_"))
    rows = []
    for number, (name, overrides) in enumerate(JOBS.items()):
        result = tlcli_train(out / str(number), *(o.format(data=data) for o in overrides))
        rows.append([name, result.accuracy, f"{result.test['n']:,}", f"{result.seconds:.0f} s"])
    publish("accuracy", ["data", "test accuracy (95 %)", "test images", "whole process"], rows, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
