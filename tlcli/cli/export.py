"""Write a run's model in another format, with its classes, preprocessing and
temperature. The file is loaded again and compared with PyTorch on test images of
the run. It is removed unless every logit is within 0.0001 and every class is the
same. With --int8 it must not lose more than 1 point of accuracy instead.

examples:
  tlcli export outputs/DATE/TIME --to onnx --int8
  tlcli export outputs/DATE/TIME --to timm --output my-model
"""

from contextlib import suppress

from tlcli.cli import fast_imports
from tlcli.cli.parser import Parser
from tlcli.cli.table import table_lines, terminal_columns
from tlcli.errors import TlcliError, UsageError
from tlcli.export import (
    FORMATS,
    GRAPHS,
    PAD_NOTE,
    check_format,
    check_not_existing,
    export,
    export_int8,
    int8_images,
    prepare,
)
from tlcli.files import expand_user
from tlcli.interrupts import handle_signals
from tlcli.runs.run_dir import CHECKPOINTS, open_run
from tlcli.specs import Fit
from tlcli.text import size_text

PARSER = Parser("export", __doc__)
PARSER.epilog = (
    "formats:\n" + "".join(f"  {name:<8} {form.summary}\n" for name, form in FORMATS.items()) + f"\n{PARSER.epilog}"
)
add = PARSER.add_argument
add("run", metavar="RUN", help="directory of a run")
add("--to", required=True, choices=tuple(FORMATS), type=check_format)
add("--output", type=expand_user, metavar="PATH", help="default: export/ in the run; nothing is overwritten")
inside = f"{GRAPHS}: take uint8 (N, S, S, 3) RGB and normalize inside; crop and resize to S pixels before"
add("--with-preprocessing", action="store_true", help=inside)
add("--int8", action="store_true", help="onnx: write an 8-bit model; print accuracy, size and speed of both models")
add("--force", action="store_true", help="with --int8: write it even if it loses more than 1 point of accuracy")
add("--checkpoint", choices=CHECKPOINTS, default="best", help="best or last epoch")


@handle_signals()
def run(argv: list[str]) -> int:
    """Export one run; return the exit code."""
    arguments = PARSER.parse_args(argv)
    chosen = FORMATS[arguments.to]
    if arguments.with_preprocessing and not chosen.has_graph:
        raise UsageError(f"--with-preprocessing: {chosen.name} holds weights and no graph; use --to {GRAPHS}")
    if arguments.int8 and chosen.name != "onnx":
        raise UsageError("--int8 needs --to onnx")
    if arguments.force and not arguments.int8:
        raise UsageError("--force goes with --int8; nothing is overwritten")
    folder = open_run(arguments.run)
    name = "model-int8.onnx" if arguments.int8 else chosen.file_name
    output = arguments.output or folder.path / "export" / name
    check_not_existing(output)  # before torch is imported
    with fast_imports():
        from msgspec.structs import replace

        from tlcli.cli.compose import load_spec
        from tlcli.cli.view import TerminalReporter
        from tlcli.engine.session import session_for
        from tlcli.runs.load import load_run

        loaded = load_run(arguments.run, arguments.checkpoint)
    dataset = None
    with suppress(TlcliError):
        dataset = load_spec(folder).dataset
    job = prepare(loaded, dataset, arguments.with_preprocessing)
    holds = f"holds    {job.metadata['input']} -> logits (N, {len(loaded.classes)})"
    if arguments.int8:
        spec, reporter = load_spec(folder), TerminalReporter(on_stderr=True)
        own = replace(spec.dataset.offline(), range=loaded.preprocessing.range)
        data = session_for(spec.cache).dataset(own, spec.seed, reporter, spec.folds, spec.fold)
        images = int8_images(loaded, data, reporter)
        found = export_int8(job, images, output, reporter, force=arguments.force)
        print(f"wrote    {output}\n{holds}\nranges   by {found.method}")
        rows = [("size", *map(size_text, found.nbytes), f"{found.nbytes[1] / found.nbytes[0]:.2f} of the bytes")]
        a, b = found.images_per_second
        rows += [("images per second", f"{a:,.0f}", f"{b:,.0f}", f"{b / a:.1f} times, on this CPU")]
        rows += [("accuracy", f"{a:.4f}", f"{b:.4f}", f"on {name}") for name, (a, b) in found.accuracies.items()]
        print(*table_lines(("<", "float32", "int8", "<"), rows, terminal_columns(), wrap=True), sep="\n")
    else:
        difference = export(job, chosen, output)
        nbytes = sum(file.stat().st_size for file in (output, *output.rglob("*")) if file.is_file())
        print(f"wrote    {output} ({size_text(nbytes)})\n{holds}")
        print(f"checked  against PyTorch on {job.source}: every class equal,")
        print(f"         largest difference of a logit {difference:.2g}")
    if job.metadata["tta"] != "none":
        print("note     the test was of each image and its mirror image (tta=flip), which no export computes")
    if not chosen.has_graph and loaded.preprocessing.fit is Fit.pad:
        print(f"note     {PAD_NOTE}")
    print(f"load it  {chosen.load.format(path=str(output))}")
    return 0
