"""One run's model as a file of another format, checked against the model that it came from."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tlcli import __version__
from tlcli.errors import TlcliError, UsageError
from tlcli.exporting import place_of, refuse_existing
from tlcli.exporting.card import BORDERS
from tlcli.exporting.check import Check, compare, logits_of
from tlcli.exporting.graphs import LOADING, OPSET, WRITERS, Normalised, write_graph
from tlcli.exporting.samples import Samples
from tlcli.exporting.weights import loading_safetensors, write_safetensors, write_timm
from tlcli.runs.load import LoadedRun
from tlcli.specs import Fit


@dataclass(frozen=True)
class Exported:
    """What was written: where, what goes in and comes out, how it was checked, the line of Python that loads it, and
    what there is to mind."""

    path: Path
    holds: str
    check: Check
    load: str
    note: str | None = None


def export(
    run: LoadedRun, to: str, samples: Samples, *, output: Path | None = None, with_preprocessing: bool = False
) -> Exported:
    """Write the model of a run in a format of FILES; by default into the run's own export/ directory.

    Raises UsageError where something is at the output's place already, TlcliError where the format cannot hold this
    network or gives something else than PyTorch. Nothing is left behind then.
    """
    path = place_of(run.path, to, output)
    with _draft(path) as draft:
        normalised = run.preprocessing.normalise(samples.images)
        reference = logits_of(run.model, normalised)
        facts = facts_of(run)
        if to in WRITERS:
            model, inputs = _graph_of(run, samples.images, normalised, with_preprocessing)
            facts = {**facts, "input": _input_words(run, with_preprocessing)}
            # nothing of an image may be in the file; of two, for a batch of one may be taken for a constant
            example = torch.zeros_like(inputs[:1]).repeat(2, 1, 1, 1)
            written: Any = write_graph(to, model, example, facts, draft)
            load, holds = LOADING[to].format(path=str(path)), f"{facts['input']} -> logits (N, {len(run.classes)})"
        elif to == "safetensors":
            written, inputs = write_safetensors(run, facts, draft), normalised
            load, holds = loading_safetensors(run, path), f"{len(run.model.state_dict()):,} tensors"
        else:
            written, inputs = write_timm(run, facts, draft), normalised
            load = f"import timm; model = timm.create_model({f'local-dir:{path}'!r}, pretrained=True).eval()"
            holds = "config.json, model.safetensors, README.md"
        check = compare(_without_gradients(written), inputs, reference, samples.source, to)
    note = BORDERS if to == "timm" and run.preprocessing.fit is Fit.pad else None
    return Exported(path, holds + (f", opset {OPSET}" if to == "onnx" else ""), check, load, note)


def facts_of(run: LoadedRun) -> dict[str, Any]:
    """What is needed to use the weights, for the metadata of a file."""
    return {
        "tlcli": __version__,
        "backbone": run.classifier.name,
        "backbone_kind": run.info["backbone_kind"],
        "classes": list(run.classes),
        "preprocessing": run.preprocessing.to_json(),
        "temperature": run.temperature,
    }


def _input_words(run: LoadedRun, with_preprocessing: bool) -> str:
    """The shape, type and values of what the graph takes."""
    size = run.preprocessing.size
    if with_preprocessing:
        return f"images uint8 (N, {size}, {size}, 3) RGB"
    return f"images float32 (N, 3, {size}, {size}) normalised"


def _graph_of(run: LoadedRun, images: Tensor, normalised: Tensor, with_preprocessing: bool) -> tuple[nn.Module, Tensor]:
    """The network that is to be a graph, and its inputs for these images."""
    if not with_preprocessing:
        return run.model, normalised.contiguous()
    own = run.preprocessing
    return Normalised(run.model, own.mean, own.std).eval(), images.permute(0, 2, 3, 1).contiguous()


def _without_gradients(model: Any) -> Any:
    return lambda inputs: logits_of(model, inputs)


@contextmanager
def _draft(path: Path) -> Iterator[Path]:
    """A place beside the output to write to, of the same name; it moves there once the block ends well.

    Raises UsageError where something is there already, TlcliError where nothing can be written there.
    """
    refuse_existing(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=".export-", dir=path.parent))
    except OSError as exc:
        raise UsageError(f"--output {path}: cannot be written ({exc.strerror or exc})") from exc
    try:
        yield folder / path.name
        refuse_existing(path)
        (folder / path.name).rename(path)
    except OSError as exc:
        raise TlcliError(f"{path}: {exc.strerror or exc}") from exc
    finally:
        shutil.rmtree(folder, ignore_errors=True)
