"""Build a classifier for the classes of a dataset: load weights, match or replace the head, reinitialize layers."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor
from torchvision.models.vision_transformer import interpolate_embeddings

from tlcli.errors import UsageError
from tlcli.models.classifier import Architecture, Classifier
from tlcli.models.weights import PretrainedWeights, published_weights, read_weights
from tlcli.specs import BackboneSpec
from tlcli.text import did_you_mean

POSITIONS = ("encoder.pos_embedding", "pos_embed")
"""Names of a ViT's table of positions in torchvision and timm."""


def build_model(spec: BackboneSpec, classes: Sequence[str], *, size: int | None, seed: int) -> Classifier:
    """Return a classifier with the weights that the spec names and a head for these classes.

    `size` is the image size in pixels (None: the backbone's own). The head keeps its weights if they are for the same
    classes, by name and in any order; else it starts random. Random weights are a function of the seed.
    Raises UsageError naming the tensor if weights do not fit.
    """
    torch.manual_seed(seed)
    given = read_weights(Path(spec.weights)) if spec.weights not in ("default", "none") else None
    if size is None and given is not None and given.preprocessing is not None:
        size = given.preprocessing["size"]
    architecture = spec.build(len(classes), size)
    dropped = tensors_to_reinit(spec.reinit, architecture)
    loaded = given
    if spec.weights == "default":
        loaded = published_weights(spec, architecture, len(classes), size or architecture.size)
    if loaded is None:
        return Classifier(spec.name, architecture, tuple(classes), notes=("weights: random (weights=none)",))
    if loaded.backbone not in (None, spec.name):
        raise UsageError(
            f"backbone.weights={loaded.source} is a {loaded.backbone}: give backbone={loaded.backbone} "
            f"(a model of timm: backbone=timm backbone.name={loaded.backbone})"
        )
    state, head_note = _match_head_by_class(loaded, architecture, tuple(classes))
    if architecture.stages[-1].tensors & dropped:
        head_note = f"head: reinitialized, {len(classes)} classes"
    state = _resample_pos_embed(state, architecture)
    kept = {name: tensor for name, tensor in state.items() if name not in dropped}
    optional = dropped | architecture.stages[-1].tensors
    _check_state_dict(kept, architecture, optional, loaded.source)
    architecture.network.load_state_dict(kept, strict=False)
    head_loaded = architecture.stages[-1].tensors <= frozenset(kept)
    notes = [f"weights: {loaded.source}", head_note]
    if dropped:
        notes.append(f"reinit: {len(dropped)} tensors start from random weights ({', '.join(spec.reinit)})")
    return Classifier(
        name=spec.name,
        architecture=replace(
            architecture, **(loaded.preprocessing or {})
        ),  # it expects what its weights were trained on
        classes=tuple(classes),
        pretrained=frozenset(kept),
        head_loaded=head_loaded,
        notes=tuple(notes),
    )


def tensors_to_reinit(items: Sequence[str], architecture: Architecture) -> frozenset[str]:
    """Return the tensors that backbone.reinit names; an item is a stage, or a regular expression for tensor names."""
    stages = {stage.name: stage.tensors for stage in architecture.stages}
    found: set[str] = set()
    for item in items:
        try:
            matched = stages.get(item) or {n for n in architecture.network.state_dict() if re.search(item, n)}
        except re.error as error:
            raise UsageError(f"backbone.reinit={item!r} is not a regular expression: {error}") from error
        if not matched:
            raise UsageError(
                f"backbone.reinit={item!r} is not a stage and matches no tensor.{did_you_mean(item, stages)} "
                f"Stages: {', '.join(stages)}"
            )
        found |= matched
    return frozenset(found)


def _match_head_by_class(
    loaded: PretrainedWeights, architecture: Architecture, classes: tuple[str, ...]
) -> tuple[dict[str, Tensor], str]:
    """Return the state with the head's rows in the order of these classes, without a head if the classes differ."""
    head = architecture.stages[-1].tensors
    body = {name: tensor for name, tensor in loaded.state.items() if name not in head}
    present = {name: tensor for name, tensor in loaded.state.items() if name in head}
    if loaded.classes is None or not present:
        return body, f"head: new, {len(classes)} classes"
    if set(loaded.classes) != set(classes):
        return body, f"head: replaced, {len(loaded.classes)} classes there, {len(classes)} others here"
    rows = torch.tensor([loaded.classes.index(name) for name in classes])
    per_class = {n: t[rows] if t.ndim and t.shape[0] == len(rows) else t for n, t in present.items()}
    return {**body, **per_class}, f"head: kept, the same {len(classes)} classes"


def _resample_pos_embed(state: Mapping[str, Tensor], architecture: Architecture) -> dict[str, Tensor]:
    """Resample a ViT's table of positions for the present image size, as its library does."""
    network: Any = architecture.network
    wanted = dict(network.named_parameters())
    changed = [n for n in POSITIONS if n in wanted and n in state and state[n].shape != wanted[n].shape]
    if "encoder.pos_embedding" in changed:
        return dict(interpolate_embeddings(network.image_size, network.patch_size, dict(state)))
    if "pos_embed" in changed and state["pos_embed"].ndim == 3 and hasattr(network, "num_prefix_tokens"):
        tokens = 0 if getattr(network, "no_embed_class", False) else network.num_prefix_tokens
        table = resample_abs_pos_embed(
            state["pos_embed"], list(network.patch_embed.grid_size), num_prefix_tokens=tokens
        )
        return {**state, "pos_embed": table}
    return dict(state)


def _check_state_dict(
    state: Mapping[str, Tensor], architecture: Architecture, optional: frozenset[str], source: str
) -> None:
    """Raise UsageError for the first tensor that is missing, unknown, of another shape, or not finite."""
    wanted = architecture.network.state_dict()
    remedy = "are they of another architecture?"
    for name, tensor in wanted.items():
        if name not in state:
            if name in optional or name.endswith("num_batches_tracked"):
                continue
            raise UsageError(f"backbone.weights={source}: no tensor {name}; {remedy}")
        if state[name].shape != tensor.shape:
            have, need = "x".join(map(str, state[name].shape)), "x".join(map(str, tensor.shape))
            raise UsageError(f"backbone.weights={source}: {name} is {have}, not {need}; {remedy}")
        if state[name].is_complex():
            raise UsageError(f"backbone.weights={source}: {name} has complex numbers; {remedy}")
        if not state[name].to(tensor.dtype).isfinite().all():  # as it is loaded: float64 holds more than float32
            raise UsageError(f"backbone.weights={source}: {name} has values that are not finite; they are damaged")
    unknown = [name for name in state if name not in wanted]
    if unknown:
        raise UsageError(f"backbone.weights={source}: unknown tensor {unknown[0]} ({len(unknown)} in all); {remedy}")
