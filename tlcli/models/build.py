"""Build a classifier for the classes of a dataset: read or download weights, running no code from their files."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from huggingface_hub.constants import HF_HUB_CACHE  # timm depends on it
from timm.layers import resample_abs_pos_embed
from torch import Tensor
from torchvision.models.vision_transformer import interpolate_embeddings

from tlcli.errors import TlcliError, UsageError
from tlcli.files import is_dir, is_file
from tlcli.models.classifier import Classifier, check_state_dict, match_names
from tlcli.models.tensorfile import class_names, read_tensors
from tlcli.specs import BackboneSpec, parse_image_stats
from tlcli.text import join_limited


@dataclass(frozen=True)
class PretrainedWeights:
    """Tensors by name and their source. Only tlcli's checkpoints have the rest."""

    source: str
    state: Mapping[str, Tensor]
    backbone: str | None = None
    classes: tuple[str, ...] | None = None
    preprocessing: Mapping[str, Any] | None = None  # size, fit, mean and std


def build_model(spec: BackboneSpec, classes: Sequence[str], *, size: int | None, seed: int) -> Classifier:
    """Return a classifier with the weights that the spec names and a head for these classes.

    `size` is that of images in pixels (None: the backbone's own). Rows of the head are taken from the weights by the
    names of their classes; others start random. Raises UsageError naming the tensor if weights do not fit.
    """
    torch.manual_seed(seed)
    loaded = read_weights(Path(spec.weights)) if spec.weights not in ("default", "none") else None
    if size is None and loaded is not None and loaded.preprocessing is not None:
        size = loaded.preprocessing["size"]
    classifier: Classifier = spec.build(len(classes), size or spec.size)
    classifier = replace(classifier, classes=tuple(classes), size=spec.size or classifier.size)
    head, network = classifier.stages[-1].tensors, classifier.network
    dropped = tensors_to_reinit(spec.reinit, classifier)
    if spec.weights == "default":
        loaded = published_weights(spec, classifier, len(classes), size or classifier.size)
    if loaded is None:
        return replace(classifier, notes=("weights: random (weights=none)",))
    if loaded.backbone not in (None, spec.name):
        advice = f"give backbone={loaded.backbone} (a model of timm: backbone=timm backbone.name={loaded.backbone})"
        raise UsageError(f"backbone.weights={loaded.source} is a {loaded.backbone}: {advice}")
    for prefix in 2 * ("module.", "_orig_mod.", "model."):  # of DataParallel, torch.compile and Lightning, also nested
        if loaded.state.keys().isdisjoint(network.state_dict()):
            loaded = replace(loaded, state={n.removeprefix(prefix): tensor for n, tensor in loaded.state.items()})
    state, known, head_note = _match_head_by_class(loaded, classifier)
    if head & dropped:
        known, head_note = (), f"head: reinitialized, {len(classes)} classes"
    state = {name: t for name, t in _resample_pos_embed(state, network).items() if name not in dropped}
    check_state_dict(state, network, f"backbone.weights={loaded.source}", optional=dropped | head)
    network.load_state_dict(state, strict=False)
    notes = [f"weights: {loaded.source}", head_note]
    if dropped:
        notes.append(f"reinit: {len(dropped)} tensors start from random weights ({', '.join(spec.reinit)})")
    return replace(
        classifier,
        pretrained=frozenset(state),
        head_loaded=head <= frozenset(state) and set(loaded.classes or ()) == set(classes),
        known_rows=known,
        lost_classes=tuple(name for name in loaded.classes or () if name not in classes),
        notes=tuple(notes),
        **(loaded.preprocessing or {}),  # of the images that the weights were trained on
    )


def tensors_to_reinit(items: Sequence[str], classifier: Classifier) -> frozenset[str]:
    """Return the tensors that backbone.reinit names; an item is a stage, or a regular expression for tensor names."""
    stages = {stage.name: stage.tensors for stage in classifier.stages}
    names = classifier.network.state_dict()
    matches = (stages.get(item) or match_names("backbone.reinit", [item], names, stages) for item in items)
    return frozenset[str]().union(*matches)


def _match_head_by_class(
    loaded: PretrainedWeights, classifier: Classifier
) -> tuple[dict[str, Tensor], tuple[int, ...], str]:
    """Return the state, with the loaded rows of the head for the classes that it knows, their positions, and a note.

    The head is left out if it knows none of the classes.
    """
    head, classes, names = classifier.stages[-1].tensors, classifier.classes, loaded.classes or ()
    body = {name: tensor for name, tensor in loaded.state.items() if name not in head}
    if loaded.classes is None or len(body) == len(loaded.state):
        return body, (), f"head: new, {len(classes)} classes"
    known = tuple(i for i, name in enumerate(classes) if name in names)
    if not known:
        counts = f"{len(names)} in the weights, {len(classes)} in the dataset"
        return body, (), f"head: replaced, the classes differ ({counts})"
    state, initial = dict(loaded.state), classifier.network.state_dict()
    rows = [names.index(classes[i]) for i in known]
    for name in head & state.keys() & initial.keys():
        old, new = state[name], initial[name]
        if old.ndim and old.shape[1:] == new.shape[1:] and (len(old), len(new)) == (len(names), len(classes)):
            state[name] = new.to(old.dtype).index_copy(0, torch.tensor(known), old[rows])
    if set(names) == set(classes):
        return state, known, f"head: loaded, the same {len(classes)} classes"
    new_classes = [name for name in classes if name not in names]
    added = f"; new: {join_limited(new_classes)}" if new_classes else ""
    return state, known, f"head: the weights know {len(known)} of the {len(classes)} classes{added}"


def _resample_pos_embed(state: dict[str, Tensor], network: Any) -> dict[str, Tensor]:
    """Resample a ViT's table of positions for the present image size, as its library does."""
    parameters = dict(network.named_parameters())
    changed = {n for n in state.keys() & parameters.keys() if state[n].shape != parameters[n].shape}
    with suppress(RuntimeError, ValueError):  # another number of tokens: `check_state_dict` names the tensor
        if "encoder.pos_embedding" in changed:  # torchvision's
            return dict(interpolate_embeddings(network.image_size, network.patch_size, state))
        if "pos_embed" in changed and state["pos_embed"].ndim == 3 and hasattr(network, "num_prefix_tokens"):  # timm's
            tokens = 0 if getattr(network, "no_embed_class", False) else network.num_prefix_tokens
            grid = list(network.patch_embed.grid_size)
            return {**state, "pos_embed": resample_abs_pos_embed(state["pos_embed"], grid, num_prefix_tokens=tokens)}
    return state


def published_weights(spec: BackboneSpec, classifier: Classifier, n_classes: int, size: int) -> PretrainedWeights:
    """Return the weights that were published with this backbone. Raise TlcliError if they cannot be downloaded."""
    try:
        source, state = spec.published(classifier, n_classes, size)
    except TlcliError:
        raise
    except Exception as error:  # of both libraries, the hub's client, its HTTP library, safetensors and unpickling
        reason = str(error.reason if isinstance(error, URLError) else error).split("\n")[0]
        if type(error).__name__ == "UnpicklingError":  # its text says how to load the file all the same
            reason = f"their file in {torch.hub.get_dir()}/checkpoints is damaged: remove it"
        advice = "Offline, set backbone.weights=FILE or backbone=efficientnet_lite0, whose weights are installed."
        raise TlcliError(f"cannot download the weights of {spec.name} ({reason}). {advice}") from error
    return PretrainedWeights(source, state)


def read_weights(path: Path) -> PretrainedWeights:
    """Return the tensors of a .safetensors file, of a state dict in a .pth or .pt file, or the best ones of a run."""
    path = path.expanduser()
    is_run = is_dir(path)
    file = path / "checkpoints" / "best.safetensors" if is_run else path
    if not is_file(file):
        raise UsageError(f"backbone.weights={path}: no such file{' (not a run directory)' if is_run else ''}")
    if file.suffix == ".safetensors":
        try:
            state, metadata = read_tensors(file)
            return PretrainedWeights(
                source=str(path),
                state=state,
                backbone=metadata.get("backbone"),
                classes=class_names(metadata["classes"]) if "classes" in metadata else None,
                preprocessing=parse_image_stats(metadata["preprocessing"]) if "preprocessing" in metadata else None,
            )
        except TlcliError as error:
            raise UsageError(f"backbone.weights={error}") from error
        except (OSError, KeyError, TypeError, ValueError) as error:
            reason = f"cannot be read, or its tlcli metadata is damaged ({type(error).__name__}: {error})"
            raise UsageError(f"backbone.weights={file}: {reason}") from error
    try:
        content: Any = torch.load(file, map_location="cpu", weights_only=True)  # noqa: TID251
    except Exception as error:  # of many kinds
        reason = f"cannot be read as plain tensors ({type(error).__name__})"
        advice = "give a state dict saved with torch.save, or .safetensors"
        raise UsageError(f"backbone.weights={path}: {reason}; {advice}") from error
    for key in ("state_dict", "model", "model_state_dict"):  # names that trainers use
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(v, Tensor) for v in content.values()) or not content:
        raise UsageError(f"backbone.weights={path}: does not hold a state dict (names and tensors)")
    for name, tensor in content.items():
        if tensor.is_nested or tensor.is_quantized or tensor.layout != torch.strided or tensor.device.type != "cpu":
            reason = f"{name} is not a plain tensor (nested, quantized, sparse or without data); save the dense one"
            raise UsageError(f"backbone.weights={path}: {reason}")
    return PretrainedWeights(str(path), {str(name): t for name, t in content.items()})


def cached_timm_models() -> list[str]:
    """Return the names of timm's models in the hub's cache."""
    folders = Path(HF_HUB_CACHE).glob("models--timm--*")
    return sorted(path.name.removeprefix("models--timm--") for path in folders if any(path.glob("snapshots/*/*")))


def verify_published(model: str) -> None:
    """Raise TlcliError unless the files of a model (`timm/NAME`) have the digests that the hub published for them.

    The hub's client names each large file by its SHA-256 digest, links to it if the system can, and compares no more.
    """
    folder = Path(HF_HUB_CACHE, f"models--{model.replace('/', '--')}")
    current = folder / "refs" / "main"
    revision = current.read_text().strip() if current.is_file() else "*"
    for file in sorted(folder.glob(f"snapshots/{revision}/*")):
        # Follow one link only: the name in the model's own folder is the digest; if the client shares files between
        # models, that is a link too, to a name that means something else
        digest = file.readlink().name if file.is_symlink() else ""
        if not file.is_file() or not re.fullmatch(r"[0-9a-f]{64}", digest):
            continue
        with file.open("rb") as content:
            if hashlib.file_digest(content, "sha256").hexdigest() != digest:
                advice = f"remove this file and {file.resolve()}, and the next run downloads it again"
                raise TlcliError(f"{file}: checksum differs from the published file of {model}: {advice}")
