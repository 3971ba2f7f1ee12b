"""Checkpoints: when those of a run are written, and what is in them."""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tlcli import __version__
from tlcli.data.batches import Preprocessing
from tlcli.data.dataset import Dataset
from tlcli.data.images import positions_by_class
from tlcli.device import Device, machine_name
from tlcli.engine.inputs import Inputs
from tlcli.engine.metrics import Scores
from tlcli.engine.trainer import Trainer
from tlcli.files import replace_with_hardlink
from tlcli.models.classifier import Classifier
from tlcli.models.tensorfile import read_tensors, write_tensors
from tlcli.runs.run_dir import RunDir
from tlcli.transfer.lora import merged, remove_low_rank

MAX_TIME_SHARE = 0.1  # of training that writing checkpoints may take: an epoch of a small head takes less than its file
_TENSOR = "$tensor"  # the key of what stands for a tensor in the JSON of a state


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write nested dicts, lists and tuples of tensors and of what JSON can hold, in one atomic step."""
    tensors: dict[str, Tensor] = {}

    def reference(tensor: Tensor) -> dict[str, str]:
        name = str(len(tensors))
        tensors[name] = tensor
        return {_TENSOR: name}

    metadata = json.loads(json.dumps(state, default=reference))  # fills tensors
    write_tensors(path, tensors, metadata)


def load_state(path: Path) -> dict[str, Any]:
    """Return what `save_state` wrote: keys are strings, sequences are lists. Raise TlcliError if it is damaged."""
    tensors, metadata = read_tensors(path)
    state: dict[str, Any] = json.loads(
        json.dumps(metadata), object_hook=lambda value: tensors[value[_TENSOR]] if _TENSOR in value else value
    )
    return state


def trainable_state(network: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that training can change: the parameters that train, and the buffers."""
    frozen = {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
    return {name: tensor for name, tensor in network.state_dict().items() if name not in frozen}


def machine_info(device: Device) -> dict[str, Any]:
    """Return what determines rounding: two machines that agree in it are assumed to give the same results."""
    accelerator = device.accelerator
    return {
        "tlcli": __version__,
        "torch": torch.__version__,
        "processes": device.ranks.size,
        "threads": torch.get_num_threads(),
        "device": accelerator.type,
        "machine": machine_name(accelerator),
    }


def image_fingerprints(data: Dataset) -> dict[str, Any]:
    """Return the classes, and for each split and class the number of images and their fingerprint."""
    fingerprints: dict[str, Any] = {"classes": list(data.classes)}
    for name, split in data.splits.items():
        by_class = positions_by_class(split.labels, len(data.classes))
        fingerprints[name] = [[len(indices), split.fingerprint(indices)[:16]] for indices in by_class]
    return fingerprints


def weights_metadata(classifier: Classifier, backbone_kind: str, preprocessing: Preprocessing) -> dict[str, Any]:
    return {
        "tlcli": __version__,
        "backbone": classifier.name,
        "backbone_kind": backbone_kind,
        "classes": list(classifier.classes),
        "preprocessing": preprocessing.to_json(),
    }


class CheckpointManager:
    """Writes the best epoch's weights, the last epoch's, and the state from which training resumes.

    The state is written after the best weights, which have their own epoch and scores: a run that is killed between the
    two resumes from either. `epoch` is the last one that has ended; -1 before the first if that is epoch 0.
    """

    def __init__(self, run: RunDir, inputs: Inputs, trainer: Trainer, epoch: int) -> None:
        self._run, self._inputs, self._trainer, self._epoch = run, inputs, trainer, epoch
        self._network = inputs.workload.classifier.network
        self._seconds = 60 * inputs.workload.spec.checkpoint.every_minutes
        self._fixed: dict[str, Any] = {"machine": machine_info(inputs.device)}
        self._best: tuple[Mapping[str, Tensor], Mapping[str, Any]] | None = None  # tensors and metadata to be written
        self._written: Mapping[str, Any] = {}  # the metadata of the best weights on the disk
        self._last: Mapping[str, Any] = {}  # the metadata of the last epoch's weights
        self._has_changes = False
        self._saved_at, self._save_seconds = time.perf_counter(), 0.1  # what the first save is assumed to take

    def after_epoch(self, epoch: int, validation: Scores | None, *, is_best: bool, averaged: bool) -> None:
        """Save after an epoch, unless saving would take more than its share of the time.

        If it is the best one, its weights are kept, or their moving average if that was `averaged` and validated.
        """
        self._epoch, self._has_changes = epoch, True
        workload = self._inputs.workload
        metadata = weights_metadata(workload.classifier, workload.spec.backbone.kind, workload.preprocessing)
        self._last = {**metadata, "epoch": epoch, "validation": validation and asdict(validation)}
        if is_best:
            with self._trainer.averaged(use=averaged):
                copies = {name: tensor.detach().clone() for name, tensor in trainable_state(self._network).items()}
            self._best = copies, {**self._last, "averaged": True} if averaged else self._last
        if time.perf_counter() - self._saved_at >= self._save_seconds / MAX_TIME_SHARE:
            self.save()

    def after_step(self) -> None:
        self._has_changes = True
        if time.perf_counter() - self._saved_at >= self._seconds:
            self.save()

    def save(self) -> None:
        """Write what has changed since the last save. Only between two steps."""
        if not self._has_changes:
            return
        start = time.perf_counter()
        self._save_best()
        if self._last and self._trainer.is_between_epochs(self._last["epoch"]):
            # a second name for the file of the best weights, if the last epoch is the best one
            is_best = self._last == self._written
            if not is_best or not replace_with_hardlink(self._run.best_checkpoint, self._run.last_checkpoint):
                write_tensors(self._run.last_checkpoint, merged(self._network, self._network.state_dict()), self._last)
        if "images" not in self._fixed:
            workload = self._inputs.workload
            self._fixed |= {"images": image_fingerprints(workload.data), "frozen": workload.contract.digest()}
            self._fixed["activations"] = self._inputs.checksums()
        state = {
            **self._fixed,
            "epoch": self._epoch,
            "weights": trainable_state(self._network),
            "trainer": self._trainer.state(),
            "metrics_bytes": self._run.metrics_bytes(),
        }
        save_state(self._run.state_file, state)
        self._has_changes, self._saved_at = False, time.perf_counter()
        self._save_seconds = self._saved_at - start

    def load_best(self, share: float) -> None:
        """Save, and load the weights of the best epoch; replace them by those at `share` of the way to them."""
        self.save()
        weights, metadata = read_tensors(self._run.best_checkpoint)
        remove_low_rank(self._network)  # they are in these weights
        self._network.load_state_dict(weights)
        if share < 1 and "interpolate" not in metadata:  # else an interrupted run has replaced them before
            self._trainer.interpolate(share)
            write_tensors(self._run.best_checkpoint, self._network.state_dict(), {**metadata, "interpolate": share})

    @contextmanager
    def save_on_exit(self) -> Iterator[None]:
        """Write the best weights so far when the block ends in an error; if it is interrupted, all that was done."""
        try:
            yield
        except BaseException as exc:
            with suppress(OSError):
                if isinstance(exc, KeyboardInterrupt):
                    self.save()
                else:
                    self._save_best()
            raise

    def _save_best(self) -> None:
        if self._best is not None:
            tensors, metadata = self._best
            state = merged(self._network, {**self._network.state_dict(), **tensors})
            write_tensors(self._run.best_checkpoint, state, metadata)
            self._written, self._best = metadata, None


class NoCheckpoints(CheckpointManager):
    """Writes nothing, for the ranks of a run other than 0."""

    def save(self, *args: Any, **settings: Any) -> None:
        """Do nothing."""

    after_epoch = save

    def load_best(self, share: float) -> None:
        """Prepare the network for the weights of rank 0."""
        remove_low_rank(self._network)
