"""`tlcli cache`: what it shows, and that it removes what it was told to and nothing else."""

import errno
import json
import os
import re
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from tlcli import ray_tasks
from tlcli.cli.completion import candidates
from tlcli.store import META, CacheEntry, Column, Store

NAMES = (("hymenoptera", "efficientnet_lite0", "classifier"), ("digits", "resnet18", "layer4.1"))
KEYS = ("ab01" * 16, "ab02" * 16)
FLAGS = ["--help ", "--shards ", "--engine ", "--shard ", "--config-dir ", "--format "]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """Give the command a cache of its own."""
    monkeypatch.setenv("TLCLI_CACHE", str(tmp_path / "cache"))
    return Store(tmp_path / "cache")


def add(store: Store, key: str, rows: int = 1257, **facts: object) -> CacheEntry:
    return store.write(key, rows, [Column("bfloat16", (16,))], facts, [[bytes(rows * 32)]])


@pytest.fixture
def two(store: Store) -> list[CacheEntry]:
    """Two entries; the first was used two hours ago, the second three days."""
    entries = []
    for key, (dataset, backbone, at), hours in zip(KEYS, NAMES, (2.5, 73), strict=True):
        entries.append(add(store, key, dataset=dataset, split="train", backbone=backbone, at=at, view=0))
        used = time.time() - hours * 3600
        os.utime(entries[-1].path / META, (used, used))
    return entries


def test_list_shows_a_line_an_entry(two, store, tlcli) -> None:
    title, first, second, total = tlcli("cache", "list").out.splitlines()
    assert title.split() == ["key", "dataset", "backbone", "at", "images", "size", "used"]
    cells = ["hymenoptera train", "efficientnet_lite0", "classifier", "1,257", "40.2 kB"]
    assert re.split(" {2,}", first) == ["ab01ab01", *cells, "2h ago"]
    assert re.split(" {2,}", second)[::6] == ["ab02ab02", "3d ago"]
    assert total == f"2 entries, 80.4 kB, in {store.root}"


def test_list_as_json(two, store, tlcli) -> None:
    for words in (("--format", "json"), ("--format=json",)):
        listed = json.loads(tlcli("cache", "list", *words).out)
        assert [entry["key"] for entry in listed] == list(KEYS)
        assert [entry["bytes"] for entry in listed] == [two[0].nbytes] * 2
        assert listed[0]["facts"] == dict(two[0].metadata)
        assert Path(listed[0]["path"]) == two[0].path
    assert tlcli("cache", "list", "--format", "table").out == tlcli("cache", "list").out
    store.clear()
    assert tlcli("cache", "list", "--format", "json").out == "[]\n"


def test_remove(two, store, tlcli) -> None:
    ended = tlcli("cache", "remove", "ab02", KEYS[1])
    assert (ended.code, ended.out) == (0, "removed 1 entry, 40.2 kB\n")
    assert [entry.key for entry in store.entries()] == [KEYS[0]]
    add(store, KEYS[1])
    assert tlcli("cache", "remove", *KEYS).out == "removed 2 entries, 80.4 kB\n"
    assert store.entries() == []


def test_clear(two, store, tlcli) -> None:
    store.add_note("choices", "a", 1)
    ended = tlcli("cache", "clear")
    assert ended.code == 0
    assert re.fullmatch(rf"removed 2 entries, 8\d\.\d kB, from {re.escape(str(store.root))}\n", ended.out)
    assert store.entries() == []
    assert store.read_notes("choices") == {}
    assert tlcli("cache", "clear").out == f"removed 0 entries, 0 B, from {store.root}\n"


WRONG = {
    "lst": "Did you mean 'list'?",
    "list json": "list takes no KEY",
    "list --fromat json": "Did you mean '--format'?",
    "list --format": "expected one argument",
    "list --format jsn": "Did you mean 'json'?",
    "clear ab01": "Did you mean 'tlcli cache remove ab01'?",
    "clear --format json": "--format goes with `tlcli cache list`",
    "remove": "name the entries",
    "remove ab0": "Give 4 or more characters of one key",
    "remove ../..": "'../..' is the start of 0 keys",
    "remove ab01 ab03": "'ab03' is the start of 0 keys",
    "remove ab01ab02": "Did you mean 'ab01ab01'?",
    "remove ab01 cdcd": "'cdcd' is the start of 2 keys",
    "list --shards 2": "--shards goes with `tlcli cache fill`",
    "fill --shards 0": "--shards: must be a whole number from 1",
    "fill --shard 64/64": "--shard: must be I/N with I from 0 to N-1, such as 0/64, not '64/64'",
    "fill --shard 0/0": "--shard: must be I/N with I from 0 to N-1",
    "fill --shard 3": "--shard: must be I/N with I from 0 to N-1",
    "fill --shard 3/64 --engine ray": "leave out --shards and --engine",
    "fill --shard 3/64": "no plan of these overrides and this number of shards",
    "fill epochs=2 --engine ray --shards 3": "pip install 'tlcli[ray]'",
    "fill freeze=head cache.mode=off": "cache.mode=off: there is nothing to fill",
    "fill epoch=2": "Did you mean 'epochs'?",
    "fill freeze=early --shards 2": "is random in each epoch",
    "fill -m freeze=head,none": "unknown flag '-m'",
}


@pytest.mark.parametrize("line", WRONG)
def test_what_is_wrong_is_one_line_and_removes_nothing(line, two, store, tlcli, monkeypatch) -> None:
    monkeypatch.setattr(ray_tasks, "find_spec", lambda name: None)
    for n in (1, 2):
        add(store, "cdcd" * 15 + f"{n:04}")
    ended = tlcli("cache", *line.split())
    assert ended.code == 2
    assert ended.out == ""
    assert ended.err.startswith("tlcli cache: ") and ended.err.count("\n") == 1
    assert WRONG[line] in ended.err
    assert len(store.entries()) == 4


def test_what_the_system_does_not_let_go_is_one_line(two, tlcli, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, target: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "rename", refuse)
    for words in (("remove", "ab01"), ("clear",)):
        ended = tlcli("cache", *words)
        assert ended.code == 1
        assert ended.err == f"tlcli cache: {two[0].path}: Permission denied\n"


def test_clear_goes_on_if_a_folder_is_not_empty_yet(two, store, tlcli, monkeypatch: pytest.MonkeyPatch) -> None:
    """On NFS a removed file that another process has open stays in its folder under another name."""
    monkeypatch.setattr(Path, "rmdir", Mock(side_effect=OSError(errno.ENOTEMPTY, "Directory not empty")))
    ended = tlcli("cache", "clear")
    assert (ended.code, ended.err, store.entries()) == (0, "", [])
    assert ended.out.startswith("removed 2 entries, ")


def test_a_shard_that_fails_has_its_reason(store, tlcli, monkeypatch: pytest.MonkeyPatch) -> None:
    crashed = type("WorkerCrashedError", (Exception,), {"__module__": "ray.exceptions"})("the worker\ndied")
    errors = [OSError(errno.ENOSPC, "2.1 GB is over cache.max_gb=1"), crashed]
    monkeypatch.setattr("tlcli.fill.write_plan", lambda *args: SimpleNamespace(summary="a plan"))
    monkeypatch.setattr("tlcli.fill.read_plan", Mock())
    monkeypatch.setattr("tlcli.fill.complete", lambda *args: [0, 1])
    monkeypatch.setattr("tlcli.fill.run_shards", lambda *args, on_ray: enumerate(errors))
    ended = tlcli("cache", "fill", "--shards=2")
    failed = [line for line in ended.err.splitlines() if line.startswith("shard ")]
    assert failed == ["shard 0/2 failed: 2.1 GB is over cache.max_gb=1", "shard 1/2 failed: the worker died"]
    assert ended.code == 1 and "2 of 2 shards are missing (2 failed)" in ended.err


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("tlcli cache ", ["list ", "remove ", "clear ", "fill ", *FLAGS]),
        ("tlcli cache fill --engine ", ["here ", "ray ", "slurm "]),
        ("tlcli cache fill freeze=hea", ["freeze=head "]),
        ("tlcli cache fill ab", []),
        ("tlcli cache list --format ", ["table ", "json "]),
        ("tlcli cache remove ab", [f"{KEYS[0]} ", f"{KEYS[1]} "]),
        (f"tlcli cache remove {KEYS[0]} ab", [f"{KEYS[1]} "]),
    ],
)
def test_completion(line, wanted, two) -> None:
    assert candidates(line) == wanted
