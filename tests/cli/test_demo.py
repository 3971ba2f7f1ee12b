"""`tlcli demo`: the answers of `tlcli predict` on a page that only this machine can open."""

import base64
import io
import json
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import uvicorn
from PIL import Image

from tests.cli.conftest import Tlcli
from tests.security.test_network import refused
from tlcli.cli import demo
from tlcli.predict import Predictor, decode_image
from tlcli.runs.load import LoadedRun, load_run
from tlcli.store import Store, cache_dir

HOSTILE = ("<script>alert(1)</script>", "</script><img src=x onerror=alert(1)>", "{{ 7777 * 7 }}")


@pytest.fixture(scope="module")
def run(trained: Callable[..., Path]) -> Path:
    return trained("head", "fp32")


@contextmanager
def serving(loaded: LoadedRun) -> Iterator[str]:
    """Serve the page in a thread; yield its host and port."""
    app = demo.make_app(loaded, Predictor(loaded, torch.device("cpu"), Store(cache_dir())))
    with socket.socket() as listener:
        listener.bind((demo.HOST, 0))
        listener.listen()
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off", ws="none"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"{demo.HOST}:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(20)


@pytest.fixture(scope="module")
def address(run: Path) -> Iterator[str]:
    with serving(load_run(run)) as found:
        yield found


def post(address: str, content: bytes, **headers: str) -> tuple[int, Any]:
    connection = HTTPConnection(address, timeout=30)
    connection.request("POST", "/classify", content, headers)
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response.status, json.loads(body) if body.startswith(b"{") else body


def picture_of(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/jpeg;base64,"))))).astype(int)


def test_the_answer_is_that_of_predict(tlcli: Tlcli, run: Path, shapes: Path, address: str) -> None:
    file = shapes / "test/down/003.png"
    status, answer = post(address, file.read_bytes())
    row = json.loads(tlcli("predict", str(run), str(file)).out)
    assert status == 200
    assert [name for name, _ in answer["top"]] == [name for name, _ in row["top"]]
    assert [p for _, p in answer["top"]] == pytest.approx([p for _, p in row["top"]], abs=1e-6)
    assert answer["unknown_score"] == pytest.approx(row["unknown_score"], abs=1e-5)
    assert answer["unknown"] == row["unknown"]
    picture, heat = picture_of(answer["picture"]), picture_of(answer["map"])
    assert picture.shape == heat.shape == (32, 32, 3)
    assert np.abs(picture - np.asarray(Image.open(file))).mean() < 20
    assert (heat[..., 0] - heat[..., 2]).max() > 60


def test_a_file_that_predict_refuses_is_refused_for_the_same_reason(run: Path, shapes: Path, address, tmp_path) -> None:
    good, bomb = (shapes / "test/down/003.png").read_bytes(), io.BytesIO()
    Image.new("1", (13_500, 13_500)).save(bomb, "PNG")
    files = {"text": b"not an image", "empty": b"", "half": good[: len(good) // 2], "bomb": bomb.getvalue()}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        status, answer = post(address, content)
        expected = decode_image(str(tmp_path / name), load_run(run).preprocessing)[1]
        assert (status, answer) == (422, {"error": expected})
    assert "decompression bombs" in str(answer)
    assert post(address, good)[0] == 200


def test_requests_of_other_sites_are_refused(address: str, shapes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = (shapes / "test/down/003.png").read_bytes()
    assert post(address, good, Origin=f"http://{address}")[0] == 200
    assert post(address, good, Host="localhost")[0] == 200
    for headers, status in [({"Host": "evil.example"}, 400), ({"Host": f"{address}.evil.example"}, 400)]:
        assert post(address, good, **headers)[0] == status
    assert post(address, good, Origin="http://evil.example") == (403, {"error": "sent by another page"})
    monkeypatch.setattr(demo, "MAX_UPLOAD_BYTES", 100)
    assert post(address, good) == (413, {"error": "larger than 64.0 MB"})


@pytest.mark.parametrize(
    ("port", "message"), [("99999", "must be at most 65535"), ("0", "must be a whole number"), ("TAKEN", "in use")]
)
def test_a_port_that_cannot_be_had_is_one_line(tlcli: Tlcli, run: Path, port: str, message: str) -> None:
    with socket.socket() as other:
        other.bind((demo.HOST, 0))
        other.listen()
        ended = tlcli("demo", str(run), "--port", port.replace("TAKEN", str(other.getsockname()[1])))
    assert (ended.code, ended.out, ended.err.count("\n")) == (2, "", 1)
    assert message in ended.err


def test_it_listens_on_this_machine_only(tlcli: Tlcli, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = []
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: places.extend(s.getsockname() for s in sockets))
    with socket.socket() as free:
        free.bind((demo.HOST, 0))
        port = free.getsockname()[1]
    ended = tlcli("demo", str(run), "--port", str(port))
    assert (ended.code, ended.out) == (0, f"http://127.0.0.1:{port}  (Ctrl-C ends it)\n")
    assert places == [("127.0.0.1", port)]


def test_without_its_libraries_it_names_the_command(tlcli: Tlcli, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    ended = tlcli("demo", str(run))
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert "pip install 'tlcli[demo]'" in ended.err


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it(run: Path, number: signal.Signals, code: int) -> None:
    with socket.socket() as free:
        free.bind((demo.HOST, 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tlcli", "demo", str(run), "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline().startswith(f"http://127.0.0.1:{port}")
        connection = HTTPConnection(f"127.0.0.1:{port}", timeout=30)
        connection.request("GET", "/")
        assert b"Drop an image here" in connection.getresponse().read()
        process.send_signal(number)  # with a connection open
        assert process.wait(30) == code
        assert process.stderr.read().count("\n") == 1
        connection.close()


# -- in a browser


DROP = """([name, content]) => {
  const files = new DataTransfer();
  files.items.add(new File([Uint8Array.from(atob(content), c => c.charCodeAt(0))], name));
  document.body.dispatchEvent(new DragEvent("drop", {dataTransfer: files, bubbles: true, cancelable: true}));
}"""


CLICK_TWICE = """() => {
  const camera = document.getElementById("camera"), media = navigator.mediaDevices;
  const open = media.getUserMedia.bind(media);
  let opened = 0;
  media.getUserMedia = wanted => { opened++; return open(wanted); };
  camera.click();
  camera.click();
  return opened;
}"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("width", "scheme", "color"), [(390, "light", "rgb(255, 255, 255)"), (1280, "dark", "rgb(20, 22, 26)")]
)
def test_an_image_that_is_dropped_is_classified(browser: Any, run: Path, shapes: Path, width, scheme, color) -> None:
    loaded, file = load_run(run), shapes / "test/down/003.png"
    loaded = replace(loaded, classifier=replace(loaded.classifier, classes=HOSTILE))
    with refused() as asked, serving(loaded) as address:
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        complaints: list[str] = []
        addresses: list[str] = []
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: addresses.append(request.url))
        page.goto(f"http://{address}/")
        page.evaluate(DROP, [file.name, base64.b64encode(file.read_bytes()).decode()])
        page.wait_for_selector("#answer:not([hidden])")
        shown = page.locator("#top tr").all_inner_texts()
        expected = load_run(run).predict(file)
        names = dict(zip(load_run(run).classes, HOSTILE, strict=True))
        assert [re.split(r"\t+", row)[0].strip() for row in shown] == [names[name] for name, _ in expected]
        assert f"{100 * expected[0][1]:.1f}\xa0%" in shown[0]
        assert page.inner_text("#class") == names[expected[0][0]] and page.inner_text("#message") == file.name
        assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth === 32)")
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == color
        assert complaints == []
        page.evaluate(DROP, ["notes.txt", base64.b64encode(b"words").decode()])
        page.wait_for_selector("#message.bad")
        assert page.inner_text("#message") == "notes.txt: not an image" and page.is_hidden("#answer")
        assert page.evaluate(CLICK_TWICE) == 1
        page.wait_for_function("() => document.getElementById('video').videoWidth > 0")
        page.click("#camera")  # takes the picture
        page.wait_for_selector("#answer:not([hidden])")
        assert page.inner_text("#message") == "camera" and page.is_hidden("#video")
        asked_for = {url.removeprefix(f"http://{address}") for url in addresses if not url.startswith("data:")}
        assert asked_for == {"/", "/classify"}
        page.close()
    assert asked == []
