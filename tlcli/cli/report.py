"""Write one HTML file about a run, even a failed one: results with intervals,
curves, confusion, metrics per class, mistakes with heat maps of where the network
looked, calibration, settings and times. For a sweep: the leaderboard, and each key
against validation. The file needs no network and no other file.

examples:
  tlcli report outputs/2026-11-24/10-15-00
  tlcli report outputs/2026-11-24/10-20-00 --output s.html --open
"""

import os

from tlcli.cli import fast_imports
from tlcli.cli.parser import Parser
from tlcli.errors import TlcliError, UsageError
from tlcli.files import atomic_write, expand_user
from tlcli.runs.run_dir import RunDir, is_sweep, mapping, pair

PARSER = Parser("report", __doc__)
add = PARSER.add_argument
add("run", metavar="RUN|SWEEP", help="directory of a run or a sweep")
place = "default: report.html in RUN; only an earlier report is replaced"
add("-o", "--output", type=expand_user, metavar="FILE", help=place)
add("--open", action="store_true", help="show the report in the browser")


def run(argv: list[str]) -> int:
    """Write the report of a run or a sweep and print its path; return the exit code."""
    arguments = PARSER.parse_args(argv)
    folder = expand_user(arguments.run)
    output = arguments.output or folder / "report.html"
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such directory; give a run or a sweep (`tlcli list` shows them)")
    if not RunDir(folder).info_file.exists() and not is_sweep(folder):
        raise UsageError(f"{folder}: not a run or a sweep (no run.json or sweep.json); `tlcli list` finds runs")
    with fast_imports():  # torch and matplotlib
        from tlcli.cli.compose import load_spec
        from tlcli.data.dataset import images_by_key
        from tlcli.runs.report import GENERATOR, render, run_view, sweep_view
    remedy, sign = "choose another file with --output FILE", f'<meta name="generator" content="{GENERATOR}'.encode()
    if output.is_dir() or not output.parent.is_dir():
        raise UsageError(f"--output {output}: not a file in an existing directory; {remedy}")
    if os.path.lexists(output):
        is_readable = output.is_file() and not output.is_symlink() and os.access(output, os.R_OK)
        if not is_readable or sign not in output.read_bytes()[:2048]:
            raise UsageError(f"{output} already exists and is not a report of tlcli; {remedy}")
    if is_sweep(folder):
        page = render("sweep.html.j2", sweep_view(folder, output))
    else:
        run_dir, images, reason = RunDir(folder), {}, None
        if run_dir.test_predictions.exists():
            try:
                bounds = pair(mapping(run_dir.info.get("preprocessing")).get("range"))
                images = images_by_key(load_spec(run_dir).dataset, bounds)
            except (TlcliError, OSError) as exc:
                reason = f"The images are not shown, because the dataset cannot be read: {str(exc).rstrip('.')}."
        page = render("run.html.j2", run_view(run_dir, images, reason))
    try:
        atomic_write(output, page.encode())  # as bytes: the digest of the style sheet is over \n
    except OSError as exc:
        raise TlcliError(f"{output}: cannot write ({exc.strerror or exc}); {remedy}") from exc
    print(output)
    if arguments.open:
        import webbrowser

        if not webbrowser.open(output.resolve().as_uri()):
            raise TlcliError(f"no browser was found; open {output} in one")
    return 0
