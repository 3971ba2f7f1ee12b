"""Accuracy and time on ten small tasks: python -m benchmarks.quality DATA [--recipe NAME] [--tables] [-- OVERRIDE ...]

DATA has cifar10, textures, aerial, cells and mri with {train,test}/CLASS/*, and hymenoptera with {train,val}/CLASS/*.
A recipe is `tuned loop`, which is benchmarks/tuned_loop.py; `tune`, which is `tlcli tune` with three times the seconds
that the row of `default` on this machine has; `random search`, the same with random recipes and without averaging; or
any other name for `tlcli train` with default settings and the overrides behind `--`. --python and --checkout choose
another release of tlcli.

Each run is a process and one row in a file of JSON lines. Runs whose row exists are skipped, so the command can be
repeated after an interruption, and the tables are made of the rows of all recipes.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from benchmarks import tuned_loop
from benchmarks.comparison import Row, tables
from benchmarks.images import count
from benchmarks.run import ROOT, alone, machine, out_folder, parser, whole_process
from tlcli.runs.run_dir import read_predictions

DEFAULT, TUNED = "default", "tuned loop"
TUNE, RANDOM = "tune", "random search"
TUNE_RUNS = 3  # default runs in the budget of a search
TEST_PER_CLASS = 200  # of CIFAR-10 and mri
TEST_DIGITS = 360
MAX_TRAIN, MAX_TEST = 1500, 2000
OTHER = "other-"  # test files of another source begin with it; their accuracy is reported apart
IDENTITY = ("commit", "machine", "task", "recipe", "seed")

Files = dict[str, Path | np.ndarray]
"""An image file, or pixels, by its path in the task's folder: train/CLASS/NAME or test/CLASS/NAME."""

# -- tasks ------------------------------------------------------------------------------------------------------------


def of_folders(name: str, test: str, data: Path, seed: int) -> Files:
    """Return all images of the folders train and `test`."""
    return placed("train", by_class(data / name / "train")) | placed("test", by_class(data / name / test))


def cifar10(n: int, data: Path, seed: int) -> Files:
    """Return n training images per class that depend on the seed, and the first 200 test images per class."""
    test = {label: files[:TEST_PER_CLASS] for label, files in by_class(data / "cifar10/test").items()}
    return drawn(f"cifar10_{n}", by_class(data / "cifar10/train"), n, seed) | placed("test", test)


def mri(n: int, data: Path, seed: int) -> Files:
    """Return n training images per class that depend on the seed, and 200 other images of the same folder as test.

    The test images of another source are added to the test. Copies of a held-out image are not drawn.
    """
    files = by_class(data / "mri/train")
    test = drawn("mri", files, TEST_PER_CLASS, 0, split="test")
    contents = {file.read_bytes() for file in test.values() if isinstance(file, Path)}
    rest = {label: [f for f in members if f.read_bytes() not in contents] for label, members in files.items()}
    return drawn(f"mri_{n}", rest, n, seed) | test | placed("test", by_class(data / "mri/test"), OTHER)


def digits(data: Path, seed: int) -> Files:
    """Return scikit-learn's digits as gray images of 8 by 8 pixels, 360 of them as test."""
    gray, labels = load_digits(return_X_y=True)
    images = np.rint(gray * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
    test = set(train_test_split(range(len(labels)), test_size=TEST_DIGITS, stratify=labels, random_state=0)[1])
    return {f"{'test' if i in test else 'train'}/{labels[i]}/{i:04}.png": image for i, image in enumerate(images)}


@dataclass(frozen=True)
class Task:
    """The files of a task for a data folder and a seed, and what differs from the default settings of a recipe."""

    files: Callable[[Path, int], Files]
    overrides: tuple[str, ...] = ()
    flip: bool = True


DIGITS = ("dataset.flip=0", "dataset.min_crop=0.85", "dataset.image_size=96")
"""Those of conf/dataset/digits.yaml."""

TASKS = {
    **{f"cifar10_{n}": Task(partial(cifar10, n)) for n in (10, 50, 150)},
    "hymenoptera": Task(partial(of_folders, "hymenoptera", "val")),
    "digits": Task(digits, DIGITS, flip=False),
    **{f"mri_{n}": Task(partial(mri, n)) for n in (20, 150)},
    **{name: Task(partial(of_folders, name, "test")) for name in ("textures", "aerial", "cells")},
}


def by_class(folder: Path) -> dict[str, list[Path]]:
    """Return the files of each class folder, both sorted by name."""
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    return {path.name: sorted(f for f in path.iterdir() if not f.name.startswith(".")) for path in classes}


def placed(split: str, files: Mapping[str, Sequence[Path]], prefix: str = "") -> Files:
    """Return the files by their path in the task's folder."""
    return {f"{split}/{label}/{prefix}{file.name}": file for label, members in files.items() for file in members}


def drawn(name: str, files: Mapping[str, Sequence[Path]], n: int, seed: int, split: str = "train") -> Files:
    """Return n random files per class. The draw depends on the seed and the name of the task."""
    chosen = {}
    for label, members in files.items():
        generator = np.random.default_rng([seed, zlib.crc32(f"{name}/{label}".encode())])
        chosen[label] = [members[i] for i in generator.choice(len(members), n, replace=False)]
    return placed(split, chosen)


def make(name: str, data: Path, seed: int, out: Path) -> Path:
    """Return the folder of a task, with train/CLASS/* and test/CLASS/*; write it if it is missing."""
    folder = out / "tasks" / f"{name}-{seed}"
    if not folder.exists():
        draft = folder.with_name(f"{folder.name}.draft")
        shutil.rmtree(draft, ignore_errors=True)
        for place, content in TASKS[name].files(data, seed).items():
            (draft / place).parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, Path):
                shutil.copy(content, draft / place)
            else:
                Image.fromarray(content).save(draft / place)
        draft.rename(folder)
    assert count(folder / "train") <= MAX_TRAIN and count(folder / "test") <= MAX_TEST, folder
    return folder


# -- runs -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """A way to train: a name, and the interpreter, the checkout and the overrides of tlcli."""

    name: str = DEFAULT
    python: Path = Path(sys.executable)
    checkout: Path = ROOT
    overrides: tuple[str, ...] = ()
    small: bool = False

    def train(
        self, task: Task, folder: Path, seed: int, run: Path, budget: float | None
    ) -> tuple[dict[str, bool], float]:
        """Return True or False for each test file CLASS/NAME, and the seconds of the whole process."""
        if self.name == TUNED:
            settings = {"size": 32, "epochs": 1} if self.small else {}
            result = alone(tuned_loop.fine_tune, root=str(folder), seed=seed, flip=task.flip, **settings)
            return is_correct(result["predicted"]), result["process_seconds"]
        shutil.rmtree(run, ignore_errors=True)
        words = ["dataset=imagefolder", f"dataset.root='{folder}'", f"seed={seed}"]
        if budget is None:
            words = ["train", *words, f"hydra.run.dir='{run}'"]
        else:
            words = ["tune", *words, f"hydra.sweep.dir='{run}'", f"budget={budget:.0f}s"]
        if self.name == RANDOM:
            text = (self.checkout / "conf/tune/default.yaml").read_text(encoding="utf-8")
            for key, value in (("sampler", "random"), ("average", "1"), ("first", "[{}]\nrest")):
                text = re.sub(rf"^{key}:.*", f"{key}: {value}", text, flags=re.MULTILINE)
            config = run.with_name(f"{run.name}-conf")
            (config / "tune").mkdir(parents=True, exist_ok=True)
            (config / "tune/random.yaml").write_text(re.sub(r"\nrest\n(  - .*\n)+", "\n", text), encoding="utf-8")
            words += [f"--config-dir={config}", "tune=random"]
        words += [*task.overrides, *(("epochs=1", "image.size=32") if self.small else ()), *self.overrides]
        with tempfile.TemporaryDirectory(prefix="activations_") as cache:
            variables = {"TLCLI_CACHE": cache, "PYTHONPATH": str(self.checkout)}
            ended = whole_process([str(self.python), "-m", "tlcli", *words], variables, self.checkout)
        for checkpoints in [run / "checkpoints", *run.glob("*/checkpoints")]:  # 50 MB that nothing reads
            shutil.rmtree(checkpoints, ignore_errors=True)
        run = run if budget is None else run / "best"
        stored = read_predictions(run / "test_predictions.safetensors")
        classes = [stored.classes[index] for index in stored.logits.argmax(dim=1)]
        return is_correct(dict(zip(stored.keys, classes, strict=True))), ended.seconds


def is_correct(predicted: Mapping[str, str]) -> dict[str, bool]:
    """Return by CLASS/NAME if the predicted class is the folder of the file."""
    paths = {Path(name): label for name, label in predicted.items()}
    return {f"{path.parent.name}/{path.name}": path.parent.name == label for path, label in paths.items()}


def measure(
    recipe: Recipe, data: Path, out: Path, file: Path, seeds: Sequence[int], tasks: Sequence[str], beside: bool = False
) -> None:
    """Run the recipe for each seed and task that has no row, and append the rows to the file.

    Their commit is the last one that changed what the recipe runs.
    """
    code = ("benchmarks/tuned_loop.py", "benchmarks/baselines.py") if recipe.name == TUNED else ("tlcli", "conf")
    command = ["git", "-C", str(recipe.checkout), "log", "-1", "--abbrev=7", "--format=%h", "--", *code]
    commit = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    for seed, name in [(seed, name) for seed in seeds for name in tasks]:
        identity = dict(zip(IDENTITY, (commit, machine(), name, recipe.name, seed), strict=True))
        existing = [row for row in read(file) if identity.items() <= row.items()]
        if any(beside or row["seconds"] is not None for row in existing):
            continue
        budget = None
        if recipe.name in (TUNE, RANDOM):
            like = {"machine": machine(), "task": name, "recipe": DEFAULT, "seed": seed}
            rows = [row for row in read(file) if like.items() <= row.items() and row["seconds"] is not None]
            assert rows, f"run the recipe {DEFAULT!r} on {name} with seed {seed} first, on this machine"
            budget = TUNE_RUNS * rows[-1]["seconds"]
        folder = make(name, data, seed, out)
        run = out / "runs" / re.sub(r"[^\w.-]", "_", f"{recipe.name}-{commit}-{name}-{seed}")
        correct, seconds = recipe.train(TASKS[name], folder, seed, run, budget)
        files = sorted(f"{path.parent.name}/{path.name}" for path in (folder / "test").glob("*/*"))
        assert sorted(correct) == files, f"{run}: not the test files of {folder}"
        bits, other = ([correct[f] for f in files if (f"/{OTHER}" in f) == is_other] for is_other in (False, True))
        row = identity | {
            "accuracy": float(np.mean(bits)),
            "seconds": None if beside else round(seconds, 2),
            "n": len(bits),
            "n_train": count(folder / "train"),
            "correct": np.packbits(bits).tobytes().hex(),
            "other_source": {"accuracy": float(np.mean(other)), "n": len(other)} if other else None,
        }
        with file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")


def read(file: Path) -> list[Row]:
    """Return the rows of a file; none if it is missing."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def main(words: Sequence[str]) -> None:
    """Run the recipe on the tasks, and print the tables of all rows in the file."""
    split = words.index("--") if "--" in words else len(words)
    command = parser(__doc__)
    command.add_argument("--recipe", default=DEFAULT, metavar="NAME", help=f"`{TUNED}`, or a name for tlcli's rows")
    command.add_argument("--python", type=Path, default=Path(sys.executable), help="interpreter that runs tlcli")
    command.add_argument("--checkout", type=Path, default=ROOT, help="checkout of tlcli to measure")
    command.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    command.add_argument(
        "--tasks", nargs="+", default=list(TASKS), choices=TASKS, metavar="TASK", help=", ".join(TASKS)
    )
    command.add_argument("--rows", type=Path, help="file of the rows (default: quality.jsonl in the folder)")
    command.add_argument(
        "--beside", action="store_true", help="record no times, because other work runs on the machine"
    )
    command.add_argument("--tables", action="store_true", help="only print the tables")
    command.add_argument("--base", default="default 0.5.0", help="recipe that the others are compared with")
    given = command.parse_args(words[:split])
    out = out_folder(given.out, "quality")
    file = given.rows or out / "quality.jsonl"
    if not given.tables:
        overrides = tuple(words[split + 1 :])
        python, checkout = given.python.absolute(), given.checkout.absolute()
        recipe = Recipe(given.recipe, python, checkout, overrides, given.small)
        measure(recipe, given.data, out, file, given.seeds, given.tasks, given.beside)
    tables(read(file), given.base, out)


if __name__ == "__main__":
    main(sys.argv[1:])
