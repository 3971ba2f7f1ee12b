"""What a key depends on, and that rows of activations come as the images would."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.conftest import Compose, make_folder
from tlcli.data.batches import ImageBatches, Preprocessing
from tlcli.data.images import ImageArrays, Split
from tlcli.device import Device
from tlcli.engine import activations, loaders
from tlcli.engine.activations import Workload, activations_key, image_size, merge_splits, row_indices
from tlcli.engine.decisions import decide
from tlcli.engine.inputs import Inputs
from tlcli.engine.loaders import ActivationLoader, ImageLoader
from tlcli.engine.session import ActivationReader, Session
from tlcli.reporter import Reporter
from tlcli.specs import Fit
from tlcli.store import CacheEntry, Column, Store, cache_dir
from tlcli.transfer.contract import apply_freeze

CPU = torch.device("cpu")
AUGMENTED = ("augment=basic", "cache.views=2", "epochs=3")
Keys = dict[str, tuple[str, ...]]


class Planner:
    """Keys by role, as a run has them."""

    def __init__(self, spec: Compose, root: Path) -> None:
        self.spec, self.root = spec, root
        self.session = self.new_session()

    @staticmethod
    def new_session() -> Session:
        return Session(Store(cache_dir()), 0)

    def keys(
        self, *overrides: str, root: Path | None = None, change: Callable[[nn.Module], object] | None = None
    ) -> Keys:
        """The keys under these overrides; `change` is done to the network first, in a session of its own."""
        spec = self.spec(
            *("dataset=imagefolder", f"dataset.root='{root or self.root}'", "image.size=32", "freeze=head"),
            *("device.precision=fp32", "device.channels_last=true", "freeze.head_init=random", *overrides),
        )
        session = self.session if change is None else self.new_session()
        data = session.dataset(spec.dataset, spec.seed, Reporter())
        model = session.model(spec.backbone, data.classes, size=image_size(spec), seed=spec.seed)
        if change is not None:
            with torch.no_grad():
                change(model.network)
        contract = apply_freeze(spec.freeze, model)
        workload = Workload(data, model, contract, spec, CPU, session)
        inputs = Inputs(decide(workload), workload)
        return {name: tuple(source.key for source in split.views) for name, split in inputs.cached.items()}


@pytest.fixture(scope="module")
def planner(spec: Compose, tmp_path_factory: pytest.TempPathFactory) -> Planner:
    root = tmp_path_factory.mktemp("keys")
    make_folder(root / "train", {"across": 6, "checks": 6, "down": 6})
    make_folder(root / "test", {"across": 1, "checks": 1, "down": 1})
    return Planner(spec, root)


@pytest.fixture(scope="module")
def plain(planner: Planner) -> Keys:
    return planner.keys()


@pytest.fixture(scope="module")
def augmented(planner: Planner) -> Keys:
    return planner.keys(*AUGMENTED)


# -- keys: what changes them


@pytest.mark.parametrize(
    "override",
    [
        "image.size=48",
        "image.fit=squash",
        "image.mean=[0.4,0.5,0.5]",
        "image.std=[0.5,0.5,0.4]",
        "freeze=last_stages",
        "device.precision=bf16",
        "cache.dtype=bf16",
        "device.threads=2",
    ],
)
def test_network_and_preprocessing_are_in_every_key(override: str, planner: Planner, plain: Keys) -> None:
    other = planner.keys(override, "augment=none")
    assert other.keys() == plain.keys() == {"train", "train_eval", "val", "test"}
    assert not {key for keys in other.values() for key in keys} & {key for keys in plain.values() for key in keys}


@pytest.mark.parametrize(
    "overrides",
    [
        ("seed=1",),
        ("augment.scale=[0.5,1.0]",),
        ("augment.ratio=[0.7,1.3]",),
        ("augment.flip=0.25",),
        ("augment.erasing=0.25",),
        ("augment=trivial",),
        ("augment=randaugment",),
        ("augment=randaugment", "augment.magnitude=3"),
    ],
    ids=lambda overrides: overrides[0],
)
def test_what_draws_a_view_is_in_its_key(overrides: tuple[str, ...], planner: Planner, augmented: Keys) -> None:
    other = planner.keys(*AUGMENTED, *overrides)
    assert len({*other["train"], *augmented["train"]}) == 4
    assert other["test"] == augmented["test"]  # which is not augmented


def test_no_view_is_made_that_no_epoch_reads(planner: Planner, augmented: Keys) -> None:
    keys = planner.keys(*AUGMENTED, "cache.views=8", "epochs=5")["train"]
    assert (len(keys), keys[:2]) == (5, augmented["train"])


def test_a_weight_of_the_prefix_is_in_the_key_and_one_of_the_head_is_not(planner: Planner, plain: Keys) -> None:
    def one_weight(name: str) -> Callable[[nn.Module], object]:
        return lambda network: network.get_parameter(name).view(-1)[3].add_(1e-3)

    assert planner.keys(change=lambda network: None) == plain
    assert planner.keys(change=one_weight("classifier.weight")) == plain
    deep, statistics = (
        planner.keys(change=change)
        for change in (
            one_weight("blocks.6.0.conv_pw.weight"),
            lambda network: network.get_buffer("blocks.0.0.bn1.running_var")[0].mul_(1.01),
        )
    )
    assert len({deep["test"], statistics["test"], plain["test"]}) == 3


@pytest.mark.parametrize("change", ["append", "rename", "add", "remove"])
def test_every_image_is_in_the_key_of_its_split(change: str, planner: Planner, plain: Keys, tmp_path: Path) -> None:
    root = shutil.copytree(planner.root, tmp_path / planner.root.name)
    file = root / "train/checks/003.png"
    match change:
        case "append":  # after the image's end: the pixels are the same, but only the decoder knows that
            file.write_bytes(file.read_bytes() + b"\0")
        case "rename":
            file.rename(file.with_name("3.png"))
        case "add":
            shutil.copy(root / "test/checks/000.png", root / "train/checks/999.png")
        case "remove":
            file.unlink()
    other = planner.keys(root=root)
    assert other["train"] != plain["train"]
    assert other["test"] == plain["test"]


def test_splits_have_keys_of_their_own(plain: Keys, augmented: Keys) -> None:
    assert plain["train"] == plain["train_eval"] == plain["val"]  # read from one pool
    assert plain["train"] != plain["test"]
    assert len({*augmented["train"], *augmented["val"], *augmented["test"]}) == 4


@pytest.mark.parametrize("library", ["torch", "torchvision", "timm", "Pillow"])
def test_versions_are_in_the_key(library: str, planner: Planner, plain: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    own = activations.version
    monkeypatch.setattr(activations, "version", lambda name: own(name) + ("+other" if name == library else ""))
    assert planner.keys()["test"] != plain["test"]


def test_the_digest_is_over_each_argument() -> None:
    base: dict[str, Any] = {
        "prefix_digest": "p",
        "preprocessing": Preprocessing(size=32, fit=Fit.crop, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
        "images": "i",
        "view": None,
        "dtype": torch.float32,
        "columns": (Column("float32", (8,)),),
        "device_kind": "cpu",
    }
    others = {
        "prefix_digest": "q",
        "preprocessing": replace(base["preprocessing"], fit=Fit.pad),
        "images": "j",
        "dtype": torch.bfloat16,
        "columns": (Column("bfloat16", (8,)),),
        "device_kind": "cuda",
    }
    keys = [activations_key(**base), *(activations_key(**{**base, name: value}) for name, value in others.items())]
    assert len(set(keys)) == len(keys)
    assert activations_key(**base) == keys[0]


# -- keys: what does not


@pytest.mark.parametrize(
    "overrides",
    [
        ("optimizer.lr=0.5", "optimizer=sgd"),
        ("epochs=17",),
        ("batch_size=5",),
        ("label_smoothing=0.2",),
        ("seed=1",),  # other images are held out of the same pool, and the head is not in the prefix
        ("device.workers=1",),
        ("cache.ram_gb=0",),
        ("cache.views=2",),  # of images as they are there is but one
        ("freeze=pattern", "freeze.train=['^classifier']", "augment=none"),  # another way to say freeze=head
    ],
    ids=lambda overrides: overrides[0],
)
def test_what_the_activations_do_not_depend_on_is_in_no_key(
    overrides: tuple[str, ...], planner: Planner, plain: Keys
) -> None:
    assert planner.keys(*overrides) == plain


def test_a_folder_that_moved_has_its_keys(planner: Planner, plain: Keys, tmp_path: Path) -> None:
    assert planner.keys(root=shutil.copytree(planner.root, tmp_path / "elsewhere")) == plain


def test_order_is_in_the_key_and_labels_are_not() -> None:
    split = coded(8)
    same = Split(split.images, split.indices, split.labels[::-1].copy())
    assert same.fingerprint() == split.fingerprint()
    assert Split(split.images, split.indices[::-1].copy(), split.labels).fingerprint() != split.fingerprint()


# -- rows


def coded(n: int, side: int = 8) -> Split:
    """A split of n images, no two the same."""
    pixels = np.random.default_rng(n).integers(0, 256, (n, side, side, 3), dtype=np.uint8)
    return Split(ImageArrays(pixels, "coded"), np.arange(n), np.arange(n) % 3)


def device(memory_format: torch.memory_format = torch.channels_last) -> Device:
    return Device(CPU, torch.float32, torch.float32, memory_format, compile=False, workers=0)


EIGHT = Preprocessing(size=8, fit=Fit.crop, mean=(0.5, 0.4, 0.3), std=(0.5, 0.5, 0.5))


def both(spec: Compose, split: Split, pool: Split, *, views: int | None = None) -> tuple[ImageLoader, ActivationLoader]:
    """The same images live and as rows of a table: the identity stands for the network."""
    augment = spec("augment=basic" if views else "augment=none").augment
    batches = {
        name: ImageBatches(images, EIGHT, batch_size=5, workers=0, augmentation=augment.build(EIGHT), seed=3)
        for name, images in (("split", split), ("pool", pool))
    }
    tables = [
        (torch.cat([EIGHT.normalize(x).permute(0, 2, 3, 1) for x, _ in batches["pool"].in_order(view)]).contiguous(),)
        for view in (range(views) if views else [None])
    ]
    nothing = nn.Identity()
    live = ImageLoader(batches["split"], EIGHT, device(), network=nothing, dtype=torch.float32, views=views)
    rows = row_indices(pool, split)
    labels = torch.from_numpy(split.labels)
    cached = ActivationLoader(
        tables, rows, labels, network=nothing, head=None, dtype=torch.float32, device=device(), batch_size=5, seed=3
    )
    return live, cached


def joined(batches: Iterator[Any]) -> tuple[Tensor, Tensor]:
    found = [(x, y) for (x,), y in batches]
    assert [len(y) for _, y in found[:-1]] == [5] * (len(found) - 1)
    return torch.cat([x for x, _ in found]), torch.cat([y for _, y in found])


@pytest.mark.parametrize("views", [None, 2])
def test_rows_come_as_live_images_come(spec: Compose, views: int | None) -> None:
    """In the same order for the same seed and epoch, views in turn."""
    split = coded(13)
    live, cached = both(spec, split, split, views=views)
    assert len(live) == len(cached) == 13
    for epoch in (1, 2, 3):
        for wanted, found in zip(joined(live.epoch(epoch)), joined(cached.epoch(epoch)), strict=True):
            assert torch.equal(wanted, found)
    if views:
        one, two, three = (joined(cached.epoch(epoch))[0].flatten(1).sum(1).sort().values for epoch in (1, 2, 3))
        assert torch.equal(one, three)
        assert not torch.equal(one, two)


@pytest.mark.parametrize("rows_at_once", [1, 5, 11, 1000])
def test_an_epoch_goes_on_from_any_batch(spec: Compose, rows_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same batches, each where it lies in memory when the epoch begins with the first one."""
    monkeypatch.setattr(loaders, "READ_ROWS", rows_at_once)
    split = coded(23)
    _, cached = both(spec, split, split)
    whole = [(x, x.storage_offset(), y) for (x,), y in cached.epoch(1)]
    assert len(whole) == 5
    for start in range(6):
        rest = [(x, x.storage_offset(), y) for (x,), y in cached.epoch(1, start)]
        assert len(rest) == 5 - start
        for (wanted, place, labels), (found, found_place, found_labels) in zip(whole[start:], rest, strict=True):
            assert torch.equal(wanted, found)
            assert torch.equal(labels, found_labels)
            assert place == found_place


def test_rows_of_a_pool_are_matched_to_its_splits(spec: Compose) -> None:
    everything = coded(20)
    order = np.random.default_rng(0).permutation(20)
    train, val = everything.take(np.sort(order[:14])), everything.take(np.sort(order[14:]))
    pool = merge_splits([train, val])
    assert np.array_equal(pool.indices, everything.indices)
    assert np.array_equal(pool.labels, everything.labels)
    for split in (train, val):
        live, cached = both(spec, split, pool)
        for wanted, found in zip(joined(live.epoch(2)), joined(cached.epoch(2)), strict=True):
            assert torch.equal(wanted, found)
        wanted = torch.cat([x for (x,), _ in live.in_order()])
        assert torch.equal(wanted, torch.cat([x for (x,), _ in cached.in_order()]))
        assert torch.equal(torch.from_numpy(split.labels), torch.cat([y for _, y in cached.in_order()]))


def table_feed(table: tuple[Tensor, ...], *, dtype: torch.dtype, layout: Device | None = None) -> ActivationLoader:
    n = len(table[0])
    return ActivationLoader(
        *([table], torch.arange(n), torch.arange(n)),
        network=nn.Identity(),
        head=None,
        dtype=dtype,
        device=layout or device(),
        batch_size=4,
        seed=0,
    )


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_maps_come_back_in_the_memory_format_of_the_run(memory_format: torch.memory_format) -> None:
    maps = torch.randn(6, 16, 5, 7)
    feed = table_feed((maps.permute(0, 2, 3, 1).contiguous(),), dtype=torch.float32, layout=device(memory_format))
    for (x,), y in feed.epoch(1):
        assert torch.equal(x, maps[y])
        assert x.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stored_bfloat16_is_float32_where_the_run_is(dtype: torch.dtype) -> None:
    rows, maps = torch.randn(6, 5).bfloat16(), torch.randn(6, 2, 2, 3).bfloat16()
    for (x, m), y in table_feed((rows, maps), dtype=dtype).epoch(1):
        assert x.dtype == m.dtype == dtype
        assert torch.equal(x.float(), rows[y].float())


def test_a_network_that_writes_into_its_input_leaves_the_table_alone() -> None:
    table = torch.randn(6, 5)
    before = table.clone()
    for (x,), _ in table_feed((table,), dtype=torch.float32).epoch(1):
        x.zero_()
    assert torch.equal(table, before)


def test_what_trains_may_be_added_into_the_input() -> None:
    """A batch knows nothing of those that were read together with it."""
    feed, weight = table_feed((torch.randn(6, 5),), dtype=torch.float32), nn.Parameter(torch.ones(5))
    for (x,), _ in feed.epoch(1):
        assert not x.requires_grad
        x += weight
        x.sum().backward()
    assert torch.equal(weight.grad, torch.full((5,), 6.0))


@pytest.fixture
def entry(tmp_path: Path) -> CacheEntry:
    """Ten rows of a vector in bfloat16 and a map in float32."""
    store, columns = Store(tmp_path), (Column("bfloat16", (6,)), Column("float32", (2, 2, 3)))
    generator = torch.Generator().manual_seed(0)
    parts = torch.randn(10, 6, generator=generator).bfloat16(), torch.randn(10, 2, 2, 3, generator=generator)
    with store.lock_for_write("ab", lambda: None), store.create("ab", 10, columns, {}) as writer:
        writer.append([memoryview(t.reshape(-1).view(torch.uint8).numpy()) for t in parts])
    return writer.entry


def test_tables_in_memory_and_mapped_give_the_same_batches(entry: CacheEntry) -> None:
    mapped, held = ActivationReader(0).open(entry), ActivationReader(entry.nbytes).open(entry)
    assert [t.dtype for t in mapped] == [torch.bfloat16, torch.float32]
    for epoch in (1, 2):
        feeds = [table_feed(table, dtype=torch.float32).epoch(epoch) for table in (mapped, held)]
        for (one, y), (other, same_y) in zip(*feeds, strict=True):
            assert torch.equal(y, same_y)
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_memory_holds_tables_up_to_its_size_and_for_the_next_job(entry: CacheEntry) -> None:
    tables = ActivationReader(entry.nbytes + 10)
    first = tables.open(entry)
    assert tables.open(entry) is first
    other = replace(entry, key="cd")  # the same files: there is no room for them a second time
    assert tables.open(other) is not tables.open(other)
