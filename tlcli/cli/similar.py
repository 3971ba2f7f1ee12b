"""List the images whose features are nearest to those of an image, the nearest
first. The distance is 1 minus the cosine of the angle between the vectors of
`tlcli embed`: 0 for the same direction, 1 for a right angle. The image itself is
left out.

examples:
  tlcli similar outputs/DATE/TIME image.jpg photos
  tlcli similar backbone=efficientnet_lite0 image.jpg photos --top 3 --format json
"""

import heapq
import json
from pathlib import Path

from tlcli.cli import fast_imports
from tlcli.cli.embed import add_source, load_embedder, vectors_of
from tlcli.cli.parser import Parser, whole_number
from tlcli.cli.predict import add_computing, add_paths, count_images
from tlcli.cli.table import table_lines, terminal_columns
from tlcli.errors import TlcliError
from tlcli.files import resolve_links
from tlcli.interrupts import handle_signals
from tlcli.reporter import Reporter

PARSER = Parser("similar", __doc__)
add_source(PARSER)
PARSER.add_argument("image", metavar="IMAGE", help="the image to compare with")
add_paths(PARSER)
PARSER.add_argument("--top", type=whole_number, default=10, metavar="K", help="images to list (default: 10)")
PARSER.add_format()
add_computing(PARSER)


@handle_signals()
def run(argv: list[str]) -> int:
    """List the images in argv that are nearest to one; return the exit code, 1 if some could not be read."""
    arguments = PARSER.parse_intermixed_args(argv)
    with fast_imports():
        from torch.nn.functional import normalize

        from tlcli.cli.view import TerminalReporter
    embedder, _ = load_embedder(arguments)
    total = count_images(arguments.paths)
    ((_, _, vector),) = embedder.embed([arguments.image], total=total)  # in a batch of the size of the others
    if isinstance(vector, str):
        raise TlcliError(f"{arguments.image}: {vector}")
    direction, own = normalize(vector, dim=0), resolve_links(Path(arguments.image))
    reporter = Reporter() if arguments.format == "json" else TerminalReporter(on_stderr=True)
    errors = list[str]()
    distances = (
        (max(0.0, 1 - float(direction @ normalize(other, dim=0))), path)
        for path, _, other in vectors_of("similar", embedder, arguments.paths, reporter, errors)
        if resolve_links(Path(path)) != own
    )
    nearest = heapq.nsmallest(arguments.top, distances)
    if arguments.format == "json":
        print(json.dumps([{"path": path, "distance": distance} for distance, path in nearest], indent=2))
    else:
        rows = [(f"{distance:.4f}", path) for distance, path in nearest]
        print(*table_lines(("distance", "<image"), rows, terminal_columns(), wrap=True), sep="\n")
    return 1 if errors else 0
