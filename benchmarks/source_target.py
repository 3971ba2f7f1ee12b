"""Source, then target: python -m benchmarks.source_target DATA

DATA has cifar10/train/CLASS/*.jpg and cifar10/test/CLASS/*.jpg. ResNet-18 is pretrained from random weights on five
classes, then transferred to the other five with 50 images per class: head, last stage and whole network, against random
weights.
"""

import sys
import tempfile
from pathlib import Path

from benchmarks.run import publish, tlcli_train

SOURCE = "airplane,automobile,bird,cat,deer"
TARGET = "dog,frog,horse,ship,truck"
COMMON = ("backbone=resnet18", "dataset=imagefolder", "image.size=64")
SCRATCH = ("backbone.weights=none", "optimizer.lr=1e-3", "optimizer.layer_decay=1", "freeze.head_init=random")


def main(data: Path) -> None:
    """Pretrain once, transfer three times, train once from random weights, and print the table."""
    out = Path(tempfile.mkdtemp(prefix="source_target_"))
    root = f"dataset.root='{data / 'cifar10'}'"
    words = (*COMMON, root, f"dataset.classes=[{SOURCE}]", *SCRATCH, "dataset.train_per_class=500", "epochs=10")
    source = tlcli_train(out / "source", *words)
    few = (*COMMON, root, f"dataset.classes=[{TARGET}]", "dataset.train_per_class=50", "epochs=20")
    pretrained = (*few, f"backbone.weights='{source.run}'")
    runs = {
        "head, `freeze=head`": (*pretrained, "freeze=head"),
        "last stage, `freeze=last_stages`": (*pretrained, "freeze=last_stages"),
        "whole network, `freeze=none`": (*pretrained, "freeze=none"),
        "random start, `backbone.weights=none`": (*few, *SCRATCH),
    }
    rows = []
    for name, overrides in runs.items():
        result = tlcli_train(out / name.split(",")[0].replace(" ", "_"), *overrides)
        rows.append([name, result.accuracy, str(result.test["n"]), f"{result.seconds:.0f} s"])
    print(f"source: {source.accuracy} on {source.test['n']:,} images of its own classes, {source.seconds:.0f} s\n")
    publish("source_target", ["what trains", "test accuracy (95 %)", "test images", "whole process"], rows, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
