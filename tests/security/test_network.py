"""No connection is made unless an option needs one: none in training, and none in any command on what it left."""

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from torchvision import datasets

from tests.data.samples import CONF
from tests.faults.programs import can_mount
from tests.security.conftest import SMALL
from tlcli.cli import main

ROOT = Path(__file__).parents[2]
COMMANDS = {
    "list": "list .",
    "predict": "predict {run} {image}",
    "eval": "eval {run}",
    "report": "report {run} --output page.html",
    "compare": "compare {run} {other}",
    "export": "export {run} --to pt2 --output model.pt2",
    "data check": "data check dataset=imagefolder dataset.root='{shapes}' --quick --output found",
    "inspect": "inspect {run}",
    "doctor": "doctor",
    "train on a folder": "train hydra.run.dir=folder dataset=imagefolder dataset.root='{shapes}' " + " ".join(SMALL),
    "sweep": "train -m hydra.sweep.dir=sweep seed=0,1 " + " ".join(SMALL),
}
QUICK = ("list", "predict", "eval", "report", "compare", "export", "data check")  # the kernel counts for the others


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


def words_of(command: str, run: Path, shapes: Path) -> list[str]:
    image = next((shapes / "test").rglob("*.png"))
    other = Path(shutil.copytree(run, run.with_name("other"), dirs_exist_ok=True))
    return [word.format(run=run, other=other, image=image, shapes=shapes) for word in COMMANDS[command].split()]


@pytest.mark.parametrize("command", QUICK)
def test_no_command_asks_the_network(
    command: str, finished: Path, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    with refused() as asked:
        code = main(words_of(command, run, shapes))
    assert asked == []
    assert code == 0


def test_what_is_refused_is_counted() -> None:
    with refused() as asked, socket.socket() as tcp, socket.socket(type=socket.SOCK_DGRAM) as udp:
        for call in (
            lambda: socket.create_connection(("localhost", 80)),
            lambda: tcp.connect(("192.0.2.1", 80)),
            lambda: udp.sendto(b"", ("192.0.2.1", 53)),
            lambda: socket.gethostbyname("localhost"),
        ):
            with pytest.raises(OSError, match="no network"):
                call()
    assert len(asked) == 4


def test_a_download_that_is_asked_for_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So the option is there, and this is how the others would be caught."""
    monkeypatch.chdir(tmp_path)
    with refused() as asked:
        assert main(["train", "dataset=cifar10", f"dataset.root='{tmp_path}'", "dataset.download=true"]) == 1
    assert asked


# -- the same as the kernel counts it

COUNTS = """
import json
found = {}
lines = open("/proc/self/net/snmp").read().splitlines()
for names, values in zip(lines[::2], lines[1::2]):
    found |= {names.split(":")[0] + name: int(value) for name, value in zip(names.split()[1:], values.split()[1:])}
found |= {name: int(value) for name, value in (line.split() for line in open("/proc/self/net/snmp6"))}
kinds = ("IpOutRequests", "IpOutNoRoutes", "TcpActiveOpens", "UdpOutDatagrams", "Ip6OutRequests", "Ip6OutNoRoutes")
print("\\n" + json.dumps({kind: found[kind] for kind in kinds}))
"""  # prints the requests to the kernel to send something in this network, whichever program made them


def counted(folder: Path, *lines: list[str]) -> tuple[list[int], dict[str, int]]:
    """Run command lines in an empty network namespace; return exit codes and packet counts."""
    script = 'for line in "$@"; do eval "$line" >>out.txt 2>&1; echo -n "$? "; done; "$0" -c "$COUNTS"'
    done = subprocess.run(
        ["unshare", "-rn", "bash", "-c", script, sys.executable, *map(shlex.join, lines)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COUNTS": COUNTS},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    codes, counts = done.stdout.strip().splitlines()
    return [int(code) for code in codes.split()], json.loads(counts)


@pytest.mark.slow
@pytest.mark.skipif(not can_mount(), reason="no namespaces here")
def test_the_kernel_counts_nothing_that_any_command_sends(finished: Path, shapes: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    tlcli = [sys.executable, "-m", "tlcli"]
    lines = [[*tlcli, *words_of(name, run, shapes)] for name in COMMANDS]
    codes, counts = counted(tmp_path, *lines)
    assert codes == [0] * len(COMMANDS), (tmp_path / "out.txt").read_text()
    assert set(counts.values()) == {0}, counts
    connect = 'import socket; socket.socket().connect(("192.0.2.1", 80))'
    codes, counts = counted(tmp_path, [sys.executable, "-c", connect])
    assert codes == [1]
    assert sum(counts.values()) > 0


# -- what is downloaded has a digest


SETS = sorted(path.stem for path in (CONF / "dataset").glob("*.yaml") if "class_name" in path.read_text())


@pytest.mark.parametrize("name", [SETS[0], *(pytest.param(name, marks=pytest.mark.slow) for name in SETS[1:])])
def test_every_archive_of_a_data_set_is_compared_with_its_digest(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
