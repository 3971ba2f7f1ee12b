"""The suite, S1 to S8 and predict: python -m benchmarks DATA [--small] [--only extraction training]

Each part prints its own tables; at the end comes one table of all bars. It takes about an hour and a half on two cores
of an idle machine.
"""

import sys
import traceback
from pathlib import Path

from benchmarks import cached, extraction, limits, memory, photographs, prediction, scaling, training, tutorial_job
from benchmarks.figures import Measure
from benchmarks.run import out_folder, parser, publish_measures

SUITE = {
    "extraction": extraction,
    "training": training,
    "cached": cached,
    "scaling": scaling,
    "memory": memory,
    "tutorial_job": tutorial_job,
    "prediction": prediction,
    "photographs": photographs,
}


def main(data: Path, out: Path, *, small: bool = False, only: list[str] | None = None) -> int:
    """Run the parts, also after one failed, and print one table. Return 1 if a part failed, else 0."""
    limits.main(out, small=small)
    measures: list[Measure] = []
    failed = []
    for name in only or SUITE:
        print(f"## {name}\n", flush=True)
        try:
            measures += SUITE[name].main(data, out / name, small=small)
        except Exception:  # keep the measurements of the other parts
            traceback.print_exc()
            failed.append(name)
    print("## all\n")
    publish_measures("suite", sorted(measures, key=lambda measure: measure.what[:2]), out)
    print("".join(f"{name} failed\n" for name in failed), end="")
    return 1 if failed else 0


if __name__ == "__main__":
    command = parser(__doc__)
    command.add_argument("--only", nargs="+", choices=SUITE, metavar="PART", help=f"any of {', '.join(SUITE)}")
    given = command.parse_args()
    sys.exit(main(given.data, out_folder(given.out, "suite"), small=given.small, only=given.only))
