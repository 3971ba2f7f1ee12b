"""No connection is made unless an option needs one: none in training, and none in any command on what it left."""

import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from torchvision import datasets

from tests.conftest import slow
from tests.data.samples import CONF
from tests.security.conftest import COMMANDS, SMALL
from tlcli.cli import main

COMMANDS = COMMANDS | {
    "data check": "data check dataset=imagefolder dataset.root='{shapes}' --quick --output found",
    "doctor": "doctor",
    "train on a folder": "train hydra.run.dir=folder dataset=imagefolder dataset.root='{shapes}' " + " ".join(SMALL),
    "sweep": "train -m hydra.sweep.dir=sweep seed=0,1 " + " ".join(SMALL),
}
SLOW = ("inspect", "doctor", "train on a folder", "sweep", "export as a graph")


WATCHED = {f"socket.{name}" for name in ("connect", "sendto", "sendmsg", "getaddrinfo", "gethostbyname", "getnameinfo")}
asked: list[object] | None = None  # what the program asks the network for, while that is refused


def refuse(event: str, arguments: tuple[Any, ...]) -> None:
    if asked is not None and event in WATCHED and getattr(arguments[0], "family", None) != socket.AF_UNIX:
        asked.append((event, arguments[1:]))
        raise OSError("no network")


sys.addaudithook(refuse)


@contextmanager
def refused() -> Iterator[list[object]]:
    """Refuse names and addresses to this process; sockets within the machine are not connections."""
    global asked
    asked = []
    try:
        yield asked
    finally:
        asked = None


@pytest.mark.parametrize("command", [*sorted(COMMANDS.keys() - SLOW), *slow(*SLOW)])
def test_no_command_asks_the_network(command: str, finished: Path, shapes: Path, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    names = {"other": finished, "image": next((shapes / "test").rglob("*.png")), "shapes": shapes}
    with refused() as asked:
        assert main([word.format(run=run, **names) for word in COMMANDS[command].split()]) == 0
    assert asked == []


def test_a_download_that_is_asked_for_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This shows, too, that the other tests would notice a connection."""
    monkeypatch.chdir(tmp_path)
    with refused() as asked:
        assert main(["train", "dataset=cifar10", f"dataset.root='{tmp_path}'", "dataset.download=true"]) == 1
    assert asked


SETS = sorted(path.stem for path in (CONF / "dataset").glob("*.yaml") if "class_name" in path.read_text())


@pytest.mark.parametrize("name", [SETS[0], *slow(*SETS[1:])])
def test_every_archive_of_a_data_set_is_compared_with_its_digest(name: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    digests: list[object] = []

    def note(*arguments: object, md5: object = None, **more: object) -> None:
        texts = [word for word in arguments if isinstance(word, str) and len(word) == 32]
        digests.append(md5 or (texts[0] if texts else None))

    for module in vars(datasets).values():
        for function in ("download_url", "download_and_extract_archive", "download_file_from_google_drive"):
            if hasattr(module, function):
                monkeypatch.setattr(module, function, note)
    assert main(["train", f"dataset={name}", f"dataset.root='{tmp_path}'", "dataset.download=true"]) != 0
    assert digests
    assert all(isinstance(digest, str) and len(digest) == 32 for digest in digests)
