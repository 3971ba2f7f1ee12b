"""Classify images with a finished run. Images are read and preprocessed as in
training. Probabilities are calibrated if the run held images out. A file
that does not decode is a row with its error, and the exit code is 1.

examples:
  tlcli predict outputs/2026-11-24/10-15-00 photo.jpg --heatmaps maps
  tlcli predict outputs/2026-11-24/10-15-00 photos --format csv --output all.csv
  find photos -newer last | tlcli predict outputs/2026-11-24/10-15-00 - --top 1
"""

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from tlcli.cli import fast_imports
from tlcli.cli.parser import Parser, whole_number
from tlcli.cli.table import table_lines, terminal_columns
from tlcli.errors import TlcliError, UsageError
from tlcli.files import expand_user, resolve_links
from tlcli.interrupts import handle_signals
from tlcli.reporter import Reporter
from tlcli.runs.run_dir import CHECKPOINTS, mapping
from tlcli.specs import Accelerator, Precision, Tta
from tlcli.store import Store, cache_dir
from tlcli.text import csv_line

if TYPE_CHECKING:
    from torch import device

    from tlcli.data.listing import Named
    from tlcli.predict import Prediction

STDIN = "-"
UNKNOWN = "unknown"  # the answer of --reject


def add_paths(parser: Parser) -> None:
    """Add the images that a command reads."""
    text = "an image, a folder (all images below it), a pattern in quotes, or - for a list of paths on stdin"
    parser.add_argument("paths", nargs="+", metavar="PATH", help=text)


def add_computing(parser: Parser) -> None:
    """Add the arguments that say with which weights, and how, a command runs a network over images."""
    add = parser.add_argument
    add("--checkpoint", choices=CHECKPOINTS, default="best", help="weights of the best epoch or of the last one")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="default: as the run was evaluated")
    add("--batch-size", type=whole_number, metavar="N", help="images per forward pass")
    add("--device", choices=[*map(str, Accelerator)], default="auto", help="where to compute")


PARSER = Parser("predict", __doc__)
add = PARSER.add_argument
add("run", metavar="RUN", help="directory of the run")
add_paths(PARSER)
add("--top", type=whole_number, default=5, metavar="K", help="number of most likely classes per image (default: 5)")
formats = (
    'table (default on a terminal), csv, or jsonl: one object per line, {"path", "prediction", "probability", '
    '"unknown_score", "unknown", "top": [[class, probability], ...]} or {"path", "error"}'
)
add("--format", choices=("table", "csv", "jsonl"), help=formats)
add("--output", type=expand_user, metavar="FILE", help="write to this new file")
add("--reject", action="store_true", help="answer `unknown` if the score is above that of 95 %% of held-out images")
maps = "write a gray JPEG per image into this new folder, with a map of where the network found evidence for its class"
add("--heatmaps", type=expand_user, metavar="DIR", help=f"{maps}; csv and jsonl have the file's path")
add("--tta", choices=[*map(str, Tta)], help="flip: mean over each image and its mirror image (default: as in the run)")
add_computing(PARSER)


@handle_signals()
def run(argv: list[str]) -> int:
    """Classify the images in argv, one row each; return the exit code, 1 if there were errors among them."""
    arguments = PARSER.parse_intermixed_args(argv)
    # a table on a terminal, but JSON lines for a stream
    is_table = sys.stdout.isatty() and arguments.output is None and STDIN not in arguments.paths
    form = arguments.format or ("table" if is_table else "jsonl")
    with _output(arguments.output) as file, _new_folder(arguments.heatmaps) as folder:
        with fast_imports():
            from tlcli.cli.view import TerminalReporter
            from tlcli.data.decode import BadImage
            from tlcli.engine.metrics import MIN_KNOWN
            from tlcli.predict import Prediction, Predictor
            from tlcli.runs.load import load_run

        loaded = load_run(arguments.run, arguments.checkpoint)
        if arguments.reject and loaded.threshold is None:
            reason = f"held out fewer than {MIN_KNOWN} images; train with dataset.val_fraction=0.2 or more images"
            if mapping(loaded.info.get("unknown")).get("threshold") is not None:
                reason = "has it for the weights that were kept; leave out --checkpoint last"
                if loaded.is_kept:
                    reason = "has it for the score in unknown.safetensors, which is missing"
            raise UsageError(f"--reject needs a threshold: {loaded.path} {reason}")
        tta, precision = arguments.tta and Tta(arguments.tta), Precision(arguments.precision)
        options = {"precision": precision, "tta": tta, "batch_size": arguments.batch_size}
        predictor = Predictor(loaded, *device_and_store(arguments.device), **options)
        total, top = count_images(arguments.paths), min(arguments.top, len(loaded.classes))
        has_bar = sys.stderr.isatty() and (form == "table" or not file.isatty())
        reporter = TerminalReporter(on_stderr=True) if has_bar else Reporter()
        count, n_errors, n_maps, start = 0, 0, Counter[str](), time.perf_counter()
        with (
            _writer(form, file, top, arguments.reject, folder is not None) as write,
            reporter.track("predicting", total) as advance,
        ):
            images = named_images(arguments.paths)
            if folder:  # which may be inside a folder of images
                own = resolve_links(folder)
                named = ((image, image if isinstance(image, str) else image.path) for image in images)
                images = (image for image, path in named if not resolve_links(Path(path)).is_relative_to(own))
            for prediction in predictor.predict(images, top=top, total=total, reporter=reporter):
                map_file = None
                if folder and prediction.error is None:
                    stem = Path(prediction.path).stem[:60]  # the name of a file may have 255 bytes
                    while map_file is None or map_file.exists():  # another image has the same name
                        n_maps[stem] += 1
                        map_file = folder / (f"{stem}-{n_maps[stem]}.jpg" if n_maps[stem] > 1 else f"{stem}.jpg")
                    try:
                        loaded.explain(prediction.path, prediction.top[0][0]).save(map_file, quality=90)
                    except BadImage as error:  # the file has changed since it was classified
                        prediction, map_file = Prediction(prediction.path, error=str(error)), None
                    except TlcliError as error:  # of the network, whatever the image
                        raise UsageError(f"--heatmaps: {error}; leave it out") from error
                write(prediction, map_file)
                count, n_errors = count + 1, n_errors + (prediction.error is not None)
                advance(1)
    if n_errors:
        print(f"tlcli predict: {n_errors:,} of {count:,} have no prediction: see their errors", file=sys.stderr)
    elif sys.stderr.isatty():
        speed = count / (time.perf_counter() - start)
        print(f"{count:,} images, {speed:,.0f} per second ({predictor.description})", file=sys.stderr)
    return 1 if n_errors else 0


def device_and_store(name: str) -> tuple["device", Store]:
    """Return the accelerator of this name, set up to run a network, and the user's cache."""
    from tlcli.device import find_accelerator, keep_freed_memory

    accelerator = find_accelerator(Accelerator(name))
    if accelerator.type == "cpu":
        keep_freed_memory()
    return accelerator, Store(cache_dir())


def named_images(paths: Sequence[str]) -> Iterator["Named"]:
    """Yield the images that the arguments name; for -, the lines of stdin."""
    from tlcli.data.listing import expand_image_paths

    for path in paths:
        if path == STDIN:
            lines = (os.fsdecode(line.rstrip(b"\r\n")) for line in sys.stdin.buffer)  # names need not be UTF-8
            yield from expand_image_paths(filter(None, lines), patterns=False)
        else:
            yield from expand_image_paths([path])


def count_images(paths: Sequence[str]) -> int | None:
    """Return the number of images; None for stdin, and if counting takes more than five seconds."""
    if STDIN in paths:
        return None
    deadline = time.monotonic() + 5
    count = sum(1 for _ in takewhile(lambda _: time.monotonic() < deadline, named_images(paths)))
    return count if time.monotonic() < deadline else None


@contextmanager
def _output(path: Path | None) -> Iterator[TextIO]:
    """Open a new file, or use stdout. Raises UsageError if the file exists or cannot be created."""
    if path is None:
        yield sys.stdout
        return
    try:
        file = path.open("x", encoding="utf-8", newline="", errors="surrogateescape")
    except OSError as error:
        reason = "already exists" if isinstance(error, FileExistsError) else f"cannot be written ({error.strerror})"
        raise UsageError(f"--output={path}: {reason}; choose another file") from error
    try:
        with file:
            yield file
    except BaseException:
        if path.stat().st_size == 0:
            path.unlink()  # the name is free for the next try
        raise


@contextmanager
def _new_folder(folder: Path | None) -> Iterator[Path | None]:
    """Make a folder, which is removed again if it stays empty. Raises UsageError if there is one, or none can be."""
    try:
        if folder:
            folder.mkdir(parents=True)
    except OSError as error:
        reason = "already exists" if isinstance(error, FileExistsError) else f"cannot be made ({error.strerror})"
        raise UsageError(f"--heatmaps {folder}: {reason}; choose another folder") from error
    try:
        yield folder
    finally:
        with suppress(OSError):
            if folder:
                folder.rmdir()


@contextmanager
def _writer(
    form: str, file: TextIO, top: int, rejects: bool, has_maps: bool
) -> Iterator[Callable[["Prediction", Path | None], None]]:
    """Yield a function that writes the row of a prediction: at once, or for a table at the end, Ctrl-C included."""
    rows: list[list[object]] = []
    header: list[str] = []  # until the first row
    first = 0 if rejects else 1  # of the classes with columns of their own; that of `unknown` is not the prediction

    def write(prediction: "Prediction", map_file: Path | None) -> None:
        path, error = prediction.path, prediction.error
        top_classes = [(name, round(probability, 8)) for name, probability in prediction.top]
        is_rejected = rejects and prediction.is_unknown  # a class may have the name `unknown`, too
        answer = UNKNOWN if is_rejected else top_classes[0][0] if top_classes else ""
        certainty = None if error or is_rejected else top_classes[0][1]
        if form == "table":
            others = top_classes if is_rejected else top_classes[1:]
            then = ", ".join(f"{other} {probability:.3f}" for other, probability in others)
            p = "" if certainty is None else f"{certainty:.3f}"
            mark = UNKNOWN if prediction.is_unknown and not rejects else ""
            rows.append([path, f"error: {error}" if error else answer, p, mark, then])
            return
        if form == "csv":
            cells: list[Any] = [certainty, *(cell for pair in top_classes[first:] for cell in pair)]
            cells += [None] * (2 * (top - first) + 1 - len(cells)) + [prediction.unknown_score, prediction.is_unknown]
            header.append(csv_line([path, answer, *cells, *[str(map_file or "")] * has_maps, error]))
            file.writelines(header)
            header.clear()
        else:  # in ASCII: bytes of a path that are not UTF-8 are escaped
            row: dict[str, Any] = {"path": path, "error": error}
            if error is None:
                row = {"path": path, "prediction": answer, "probability": certainty, "top": top_classes}
                row |= {"unknown_score": prediction.unknown_score, "unknown": prediction.is_unknown}
                row |= {"heatmap": str(map_file)} if map_file else {}
            file.write(json.dumps(row) + "\n")
        file.flush()

    if form == "csv":
        if hasattr(file, "reconfigure"):
            file.reconfigure(encoding="utf-8", errors="surrogateescape", newline="")
        more = [title for n in range(first + 1, top + 1) for title in (f"class_{n}", f"probability_{n}")]
        more += ["unknown_score", "unknown", *["heatmap"] * has_maps, "error"]
        header.append(csv_line(["path", "prediction", "probability", *more]))
    try:
        yield write
        file.writelines(header)
    finally:
        if rows:
            titles = ("<image", "<prediction", "prob.", "<", "<then")
            width = terminal_columns() if file.isatty() else None
            file.writelines(f"{line}\n" for line in table_lines(titles, rows, width, ("then",), wrap=True))
