"""Write the feature vector of each image to a file: the input of the head of a
run's network, or of a published one. Columns: path, label (the parent folder,
if it is a class of the run; any with backbone=), and vector (float32). Files
that do not decode are left out, ten are listed, and the exit code is 1.

examples:
  tlcli embed outputs/DATE/TIME photos --to features.parquet
  tlcli embed backbone=efficientnet_lite0 photos --to features.npz --plot map.html
"""

import os
import sys
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from tlcli.cli import fast_imports
from tlcli.cli.parser import Parser
from tlcli.cli.predict import STDIN, add_computing, add_paths, count_images, device_and_store, named_images
from tlcli.cli.rank import find_candidates
from tlcli.errors import TlcliError, UsageError
from tlcli.files import atomic_write, expand_user
from tlcli.interrupts import handle_signals
from tlcli.reporter import Reporter
from tlcli.specs import Precision
from tlcli.text import duration_text, one_line, size_text

if TYPE_CHECKING:
    from torch import Tensor

    from tlcli.embed import Embedder

MAX_ERRORS = 10  # lines on stderr


def add_source(parser: Parser) -> None:
    """Add the network whose features a command computes, and the images that it reads."""
    options = "an option of backbone= of `tlcli train`, or backbone=timm/NAME"
    text = f"directory of a run, or backbone=NAME for a network as it was published ({options})"
    parser.add_argument("source", metavar="RUN|backbone=NAME", help=text)
    parser.known_words = ("backbone=",)


PARSER = Parser("embed", __doc__)
add = PARSER.add_argument
add_source(PARSER)
add_paths(PARSER)
vectors = ".parquet, written as it is computed (pip install 'tlcli[parquet]'), or .npz, for fewer than 100,000 images"
add("--to", type=expand_user, metavar="FILE", help=vectors)
add("--plot", type=expand_user, metavar="FILE", help="an .html file with a map of at most 5,000 images, by t-SNE")
add("--force", action="store_true", help="replace files that exist")
add_computing(PARSER)


@handle_signals()
def run(argv: list[str]) -> int:
    """Embed the images in argv; return the exit code, 1 if some have no vector."""
    arguments = PARSER.parse_intermixed_args(argv)
    if arguments.to is None and arguments.plot is None:
        raise UsageError("nothing to write: give --to features.parquet, --to features.npz or --plot map.html")
    with fast_imports():
        from tlcli.cli.view import TerminalReporter
        from tlcli.embed import MAX_NPZ, SUFFIXES, Map, check_number, check_output, vector_file
    for path, suffixes in ((arguments.to, SUFFIXES), (arguments.plot, (".html",))):
        if path is not None:
            check_output(path, suffixes, force=arguments.force)
    if arguments.to is not None and arguments.to.suffix.lower() == ".npz":
        files = [path for path in arguments.paths if path != STDIN]  # which can be read once
        check_number(arguments.to, sum(1 for _ in islice(named_images(files), MAX_NPZ)))
    embedder, classes = load_embedder(arguments)
    reporter, sample, errors, n = TerminalReporter(on_stderr=True), Map(), list[str](), Counter[str]()
    source, start = one_line(arguments.source), time.perf_counter()
    with ExitStack() as stack:
        write = stack.enter_context(vector_file(arguments.to, source, force=arguments.force)) if arguments.to else None
        for path, pixels, vector in vectors_of("embed", embedder, arguments.paths, reporter, errors):
            folder = Path(os.path.abspath(path)).parent.name  # noqa: PTH100 - `..` without following a link
            label = folder if folder and (classes is None or folder in classes) else None
            n.update(images=1, labels=label is not None)
            if write is not None:
                write((path, label, vector))
            if arguments.plot is not None:
                sample.add((path, label, vector), pixels)
    if not n["images"]:
        raise TlcliError(f"nothing was written: no image {'could be read' if errors else 'was named'}")
    seconds = time.perf_counter() - start
    print(f"took     {duration_text(seconds)}, {n['images'] / seconds:,.0f} images per second ({embedder.description})")
    if arguments.to is not None:
        print(f"wrote    {arguments.to} ({size_text(arguments.to.stat().st_size)})")
        print(f"holds    {n['images']:,} vectors of {len(vector):,} numbers, {n['labels']:,} of them with a label")
    if arguments.plot is not None:
        if len(sample.points) > 1000:
            reporter.note(f"t-SNE of {len(sample.points):,} images takes up to a minute")
        page = sample.html(source).encode()
        check_output(arguments.plot, (".html",), force=arguments.force)
        atomic_write(arguments.plot, page)
        print(f"wrote    {arguments.plot} ({size_text(len(page))}): {len(sample.points):,} images")
    return 1 if errors else 0


def load_embedder(arguments: Namespace) -> tuple["Embedder", tuple[str, ...] | None]:
    """Return the embedder of the run or the backbone that the arguments name, and the classes of the run."""
    from tlcli.embed import Embedder
    from tlcli.runs.load import load_run

    options = *device_and_store(arguments.device), Precision(arguments.precision), arguments.batch_size
    key, equals, name = arguments.source.partition("=")
    if equals and key == "backbone":
        if arguments.checkpoint != "best":
            raise UsageError(f"--checkpoint {arguments.checkpoint} goes with a run; leave it out")
        from tlcli.cli.job import check_weights

        ((_, spec),) = find_candidates([name], []).values()
        check_weights(spec.backbone.weights)
        return Embedder(spec.backbone, *options), None
    loaded = load_run(arguments.source, arguments.checkpoint)
    return Embedder(loaded, *options), loaded.classes


def vectors_of(
    command: str, embedder: "Embedder", paths: Sequence[str], reporter: Reporter, errors: list[str]
) -> Iterator[tuple[str, "Tensor", "Tensor"]]:
    """Yield path, pixels and vector of each image that the paths name; add the errors of others, and print some."""
    total, n = count_images(paths), 0
    with reporter.track("embedding", total) as advance:
        for path, pixels, vector in embedder.embed(named_images(paths), total=total, reporter=reporter):
            advance(1)
            n += 1
            if pixels is None or isinstance(vector, str):
                errors.append(one_line(f"{path}: {vector}"))
            else:
                yield path, pixels, vector
    if errors:
        more = f", of which {MAX_ERRORS} are shown" if len(errors) > MAX_ERRORS else ""
        count = f"tlcli {command}: {len(errors):,} of {n:,} could not be read{more}"
        with suppress(OSError):  # if the reader of stderr has gone, the vectors are still written
            print(*errors[:MAX_ERRORS], count, sep="\n", file=sys.stderr, flush=True)
