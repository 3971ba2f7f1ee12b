"""Keys of activations, and cached rows that equal those of the images."""

import errno
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.conftest import Compose, make_folder
from tlcli.data.batches import ImageBatches, Preprocessing
from tlcli.data.images import ImageArrays, Split
from tlcli.device import DTYPES, ComputeFormat, Device
from tlcli.engine import activations, loaders
from tlcli.engine.activations import Workload, image_size
from tlcli.engine.decisions import decide, follow
from tlcli.engine.inputs import Inputs
from tlcli.engine.loaders import ActivationLoader, ImageLoader
from tlcli.engine.session import Session
from tlcli.engine.unknown import UnknownScore, fit_unknown_score
from tlcli.errors import TlcliError
from tlcli.reporter import Reporter
from tlcli.specs import Fit
from tlcli.store import CacheEntry, Column, Store, cache_dir
from tlcli.transfer.contract import apply_freeze
from tlcli.transfer.cut import Cut, NoCut

CPU = torch.device("cpu")
VIEWS = ("augment=basic", "cache.views=2", "epochs=3")
NAMES = ("train", "train_eval", "val", "test")
Keys = dict[str, tuple[str, ...]]


class Planner:
    """Keys by the name of the split, as a run has them."""

    def __init__(self, spec: Compose, root: Path, network: tuple[str, ...]) -> None:
        self.spec, self.root, self.network = spec, root, network
        self.session = Session(Store(cache_dir()), 0)

    def workload(self, *overrides: str, root: Path | None = None) -> Workload:
        words = (f"dataset.root='{root or self.root}'", *self.network, "image.size=32", "freeze=head")
        words += ("freeze.head_init=random", "device.precision=fp32", "device.channels_last=true")
        spec = self.spec("dataset=imagefolder", *words, *overrides)
        data = self.session.dataset(spec.dataset, spec.seed, Reporter(), spec.folds, spec.fold)
        model = self.session.model(spec.backbone, data.classes, size=image_size(spec), seed=spec.seed)
        return Workload(data, model, apply_freeze(spec.freeze, model), spec, CPU, self.session)

    def keys(self, *overrides: str, root: Path | None = None) -> Keys:
        workload = self.workload(*overrides, root=root)
        option = ComputeFormat(DTYPES[workload.spec.device.precision], torch.channels_last)
        splits = {name: workload.cached_split(name, NAMES, option) for name in NAMES}
        return {name: tuple(source.key for source in split.views) for name, split in splits.items()}


@pytest.fixture(scope="module")
def planner(spec: Compose, tiny: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Planner:
    root = tmp_path_factory.mktemp("keys")
    make_folder(root / "train", {"across": 6, "checks": 6, "down": 6})
    make_folder(root / "test", {"across": 1, "checks": 1, "down": 1})
    return Planner(spec, root, tiny)


@pytest.fixture(scope="module")
def plain(planner: Planner) -> Keys:
    return planner.keys()


# -- keys: what changes them


@pytest.mark.parametrize(
    "override",
    ["image.size=48", "image.fit=squash", "image.mean=[0.4,0.5,0.5]", "image.std=[0.5,0.5,0.4]", "freeze=last_stages",
     "device.precision=bf16", "cache.dtype=bf16", "device.threads=2"],
)  # fmt: skip
def test_network_and_preprocessing_are_in_every_key(override: str, planner: Planner, plain: Keys) -> None:
    other = planner.keys(override, "augment=none")
    assert not {key for keys in other.values() for key in keys} & {key for keys in plain.values() for key in keys}


def test_what_draws_a_view_is_in_its_key(planner: Planner) -> None:
    keys = planner.keys(*VIEWS)
    trains = list(keys["train"])
    for override in ("seed=1", "augment.scale=[0.5,1.0]", "augment=trivial"):
        other = planner.keys(*VIEWS, override)
        trains += other["train"]
        assert other["test"] == keys["test"]  # which is not augmented
    assert len(set(trains)) == len(trains) == 8
    more = planner.keys(*VIEWS, "cache.views=8", "epochs=5")["train"]
    assert (len(more), more[:2]) == (5, keys["train"])  # no view is made that no epoch reads


def test_a_weight_of_the_prefix_is_in_the_key_and_one_of_the_head_is_not(planner: Planner) -> None:
    workload = planner.workload()
    network, cut = workload.classifier.network, workload.cut
    digests = [cut.digest()]
    with torch.no_grad():
        for name in ("classifier.weight", "blocks.4.0.conv_pw.weight", "blocks.0.0.bn1.running_var"):
            network.state_dict()[name].view(-1)[3].add_(1e-3)
            digests.append(cut.digest())
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def test_every_image_is_in_the_key_of_its_split(planner: Planner, plain: Keys, tmp_path: Path) -> None:
    root = shutil.copytree(planner.root, tmp_path / planner.root.name)
    file = root / "train/checks/003.png"
    file.write_bytes(file.read_bytes() + b"\0")  # the pixels are the same, but only the decoder knows that
    other = planner.keys(root=root)
    assert other["train"] != plain["train"]
    assert other["test"] == plain["test"] != plain["train"] == plain["train_eval"] == plain["val"]  # one pool


def test_versions_are_in_the_key(planner: Planner, plain: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    own, keys = activations.version, {plain["test"]}
    for library in ("torch", "torchvision", "timm", "Pillow"):
        changed = lambda name, of=library: own(name) + ("+other" if name == of else "")  # noqa: E731
        monkeypatch.setattr(activations, "version", changed)
        keys.add(planner.keys()["test"])
    assert len(keys) == 5


# -- keys: what does not


@pytest.mark.parametrize(
    "overrides",
    [
        ("optimizer.lr=0.5", "optimizer=sgd", "epochs=17", "batch_size=5", "label_smoothing=0.2"),
        ("seed=1",),  # other images are held out of the same pool, and the head is not in the prefix
        ("device.workers=1", "cache.ram_gb=0", "cache.views=2"),  # there is only one view of images as they are
        ("freeze=pattern", "freeze.train=['^classifier']", "augment=none"),  # another way to say freeze=head
    ],
    ids=lambda overrides: overrides[0],
)
def test_what_the_activations_do_not_depend_on_is_in_no_key(overrides: tuple[str, ...], planner, plain) -> None:
    assert planner.keys(*overrides) == plain


def test_the_place_of_the_images_is_in_no_key(planner: Planner, plain: Keys, tmp_path: Path) -> None:
    assert planner.keys(root=shutil.copytree(planner.root, tmp_path / "elsewhere")) == plain


def test_a_run_that_lost_its_views_reads_what_it_reads_when_resumed(planner: Planner, monkeypatch) -> None:
    write = Store.write

    def full(self: Store, key: str, rows: int, columns: Any, metadata: Any, batches: Any) -> CacheEntry:
        if metadata["view"] is not None:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, key, rows, columns, metadata, batches)

    monkeypatch.setattr(Store, "write", full)
    workload = replace(planner.workload(*VIEWS), needs_probe=True)
    inputs = Inputs(decide(workload), workload)
    for name in ("train_eval", "train", "val", "test"):
        inputs.open(name, Reporter())
    resumed = Inputs(follow(inputs.decisions, workload, Reporter(), NAMES), workload)
    assert resumed.cache_info["entries"] == inputs.cache_info["entries"]


@pytest.mark.parametrize(("min_steps", "views"), [(24, None), (40, 8)])
def test_folds_read_as_many_views_as_their_refit(planner: Planner, min_steps: int, views: int | None) -> None:
    """Also if a fold, which has fewer images, has more epochs: 8 instead of 5, or 14 instead of 8."""
    words = ("augment=basic", "epochs=null", "min_epochs=1", f"min_steps={min_steps}", "batch_size=4", "folds=3")
    refit, fold = planner.workload(*words), planner.workload(*words, "fold=0")
    assert (refit.views, fold.views) == (views, views)


def test_images_that_cannot_be_read_are_not_a_cache_that_cannot_be_written(planner: Planner, monkeypatch) -> None:
    workload = planner.workload(*VIEWS, "seed=7")
    inputs = Inputs(decide(workload), workload)

    def fail(self: ImageBatches, view: int | None) -> Iterator[Any]:
        raise OSError(errno.EMFILE, "Too many open files")
        yield

    monkeypatch.setattr(ImageBatches, "in_order", fail)
    with pytest.raises(TlcliError, match="images cannot be read: Too many open files"):
        inputs.open("train", Reporter())


def test_the_unknown_score_is_fitted_to_images_if_activations_cannot_be_written(planner: Planner, monkeypatch) -> None:
    workload = planner.workload()
    inputs = Inputs(decide(workload), workload)
    assert {"train", "train_eval"} <= inputs.cached.keys()
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(activations.SplitActivations, "entry", Mock(side_effect=full))
    monkeypatch.setattr(UnknownScore, "fit", lambda layer, features, predictions: len(features))
    assert fit_unknown_score(inputs, Reporter()) == len(workload.data.train)


@pytest.mark.parametrize("is_main", [True, False])
def test_a_full_disk_at_the_lock_is_an_error_of_all_ranks(is_main: bool) -> None:
    full = [errno.ENOSPC, "No space left on device"]
    store, ranks = Mock(), Mock(is_main=is_main)
    store.find.return_value, store.lock_for_write.side_effect = None, OSError(*full)
    ranks.broadcast.side_effect = lambda value: value if is_main else full
    split = activations.SplitActivations(store, Mock(ranks=ranks), Mock(), "ab", None, {})
    with pytest.raises(OSError, match="No space left on device"):
        split.entry(Reporter(), Mock())
    ranks.broadcast.assert_called_once_with(full if is_main else None)


@pytest.mark.parametrize(("rate", "is_plain"), [(0.0, True), (0.5, False)])
def test_a_head_behind_dropout_is_not_one_linear_layer_alone(planner: Planner, rate: float, is_plain: bool) -> None:
    """In timm's networks dropout is a function before the head, so that it is in the suffix."""
    workload = planner.workload(f"backbone.dropout={rate}")
    assert (workload.plain_head(workload.cut) is not None) == is_plain


def test_a_network_with_low_rank_updates_is_not_cut_before_or_after_others(planner: Planner) -> None:
    """Their layers have no weights that a cut of an earlier job could read."""
    kinds = [type(planner.workload(f"freeze={name}").features_cut) for name in ("lora", "last_stages", "lora")]
    assert kinds == [NoCut, Cut, NoCut]


@pytest.mark.parametrize(("augment", "size"), [("basic", 24), ("none", 32)])
def test_images_that_are_not_augmented_train_at_the_size_of_evaluation(planner: Planner, augment: str, size: int):
    assert planner.workload("image.train_size=24", f"augment={augment}").train_size == size


# -- rows


def coded(n: int, side: int = 8) -> Split:
    """Return a split of n different images."""
    pixels = np.random.default_rng(n).integers(0, 256, (n, side, side, 3), dtype=np.uint8)
    return Split(ImageArrays(pixels, "coded"), np.arange(n), np.arange(n) % 3)


def device(memory_format: torch.memory_format = torch.channels_last) -> Device:
    return Device(CPU, torch.float32, torch.float32, memory_format, compile=False, workers=0)


EIGHT = Preprocessing(size=8, fit=Fit.crop, mean=(0.5, 0.4, 0.3), std=(0.5, 0.5, 0.5))


def both(spec: Compose, split: Split, *, views: int | None = None) -> tuple[ImageLoader, ActivationLoader]:
    """Return loaders of the same images, uncached and cached; the network is the identity."""
    augment = spec("augment=basic" if views else "augment=none").augment
    batches = ImageBatches(split, EIGHT, batch_size=5, workers=0, augmentation=augment.build(EIGHT), seed=3)
    tables = [
        (torch.cat([EIGHT.normalize(x).permute(0, 2, 3, 1) for x, _ in batches.in_order(view)]).contiguous(),)
        for view in (range(views) if views else [None])
    ]
    options = {"network": nn.Identity(), "dtype": torch.float32}
    live = ImageLoader(batches, device(), views=views, **options)
    rows = torch.arange(len(split))
    return live, ActivationLoader(tables, rows, split, head=None, device=device(), batch_size=5, seed=3, **options)


def joined(batches: Iterator[Any]) -> tuple[Tensor, Tensor]:
    found = [(x, y) for (x,), y in batches]
    return torch.cat([x for x, _ in found]), torch.cat([y for _, y in found])


@pytest.mark.parametrize("views", [None, 2])
def test_rows_come_as_live_images_come(spec: Compose, views: int | None) -> None:
    """In the same order for the same seed and epoch, views in turn."""
    split = coded(13)
    live, cached = both(spec, split, views=views)
    assert len(live) == len(cached) == 13
    for epoch in (1, 2, 3):
        assert [len(y) for _, y in cached.epoch(epoch)] == [5, 5, 3]
        for wanted, found in zip(joined(live.epoch(epoch)), joined(cached.epoch(epoch)), strict=True):
            assert torch.equal(wanted, found)
    if views:
        one, two, three = (joined(cached.epoch(epoch))[0].flatten(1).sum(1).sort().values for epoch in (1, 2, 3))
        assert torch.equal(one, three)
        assert not torch.equal(one, two)


@pytest.mark.parametrize("rows_at_once", [1, 11, 1000])
def test_an_epoch_resumes_at_any_batch(spec: Compose, rows_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same batches, each at the same place in memory as if the epoch began with the first one."""
    monkeypatch.setattr(loaders, "READ_ROWS", rows_at_once)
    _, cached = both(spec, coded(23))
    whole = [(x, x.storage_offset(), y) for (x,), y in cached.epoch(1)]
    for start in range(6):
        rest = [(x, x.storage_offset(), y) for (x,), y in cached.epoch(1, start)]
        for (wanted, place, labels), (found, found_place, found_labels) in zip(whole[start:], rest, strict=True):
            assert torch.equal(wanted, found) and torch.equal(labels, found_labels)
            assert place == found_place


def table_feed(table: tuple[Tensor, ...], *, dtype: torch.dtype, layout: Device | None = None) -> ActivationLoader:
    rows = np.arange(len(table[0]))
    split = Split(coded(len(rows)).images, rows, rows)
    return ActivationLoader(
        [table], torch.from_numpy(rows), split, nn.Identity(), None, dtype, layout or device(), batch_size=4, seed=0
    )


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_have_the_dtype_and_memory_format_of_the_run(memory_format: torch.memory_format, dtype) -> None:
    rows, maps = torch.randn(6, 5).bfloat16(), torch.randn(6, 16, 5, 7).bfloat16()
    table = (rows, maps.permute(0, 2, 3, 1).contiguous())
    for (x, m), y in table_feed(table, dtype=dtype, layout=device(memory_format)).epoch(1):
        assert x.dtype == m.dtype == dtype
        assert torch.equal(x.float(), rows[y].float()) and torch.equal(m.float(), maps[y].float())
        assert m.is_contiguous(memory_format=memory_format)


def test_a_network_may_write_into_its_input() -> None:
    """Neither cached rows nor batches that were read together change."""
    table, weight = torch.randn(6, 5), nn.Parameter(torch.ones(5))
    before = table.clone()
    for (x,), _ in table_feed((table,), dtype=torch.float32).epoch(1):
        assert not x.requires_grad
        x += weight
        x.sum().backward()
    assert torch.equal(weight.grad, torch.full((5,), 6.0))
    assert torch.equal(table, before)


def test_entries_in_memory_equal_mapped_ones_and_stay_for_the_next_job(tmp_path: Path) -> None:
    store, columns = Store(tmp_path), (Column("bfloat16", (6,)), Column("float32", (2, 2, 3)))
    parts = torch.randn(10, 6).bfloat16(), torch.randn(10, 2, 2, 3)
    rows = [memoryview(t.reshape(-1).view(torch.uint8).numpy()) for t in parts]
    with store.lock_for_write("ab", lambda: None):
        entry = store.write("ab", 10, columns, {}, [rows])
    session = Session(store, entry.nbytes + 10)
    mapped, first = Session(store, 0).tensors(entry), session.tensors(entry)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(parts, mapped, first, strict=True))
    assert session.tensors(entry) is first
    other = replace(entry, key="cd")  # the same files: there is no room for them a second time
    assert session.tensors(other) is not session.tensors(other)
