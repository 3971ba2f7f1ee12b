"""A page in headless Chromium, through the DevTools protocol over a pipe: no driver, no port, no network."""

import base64
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-background-networking", "--disable-component-update"),
    *("--disable-gpu", "--no-first-run", "--hide-scrollbars", "--remote-debugging-pipe"),
)
COMPLAINTS = ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")
FULL = {"captureBeyondViewport": True, "format": "png"}


class Page:
    """One tab. `complaints`: what went to the console; `requests`: the addresses that it asked for."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers, self._buffer, self._count = commands, answers, b"", 0
        self._session: str | None = None
        self.complaints: list[str] = []
        self.requests: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Log", "Runtime", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Return the result of one command, and record the events before it."""
        self._count += 1
        number = self._count
        message = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == number:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            more = os.read(self._answers, 1 << 20)
            assert more, "Chromium has gone"
            self._buffer += more
        line, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        if message.get("method") in COMPLAINTS:
            self.complaints.append(json.dumps(message["params"]))
        if message.get("method") == "Network.requestWillBeSent":
            self.requests.append(message["params"]["request"]["url"])
        return message

    def show(self, file: Path, width: int, *, scheme: str = "light", media: str = "screen", scale: float = 1) -> None:
        """Load a file at a width in CSS pixels, and wait until it is there."""
        size = {"width": width, "height": 900, "deviceScaleFactor": scale, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", media=media, features=features)
        self.call("Page.navigate", url=file.resolve().as_uri())
        while self.value("document.readyState") != "complete":
            time.sleep(0.02)

    def value(self, expression: str) -> Any:
        """Return the value of an expression; the page's policy does not apply to DevTools."""
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def picture(self, file: Path, *, height: int | None = None) -> None:
        """Return a PNG of the whole page, or of its first `height` pixels."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": height or size["height"], "scale": 1}
        data = self.call("Page.captureScreenshot", clip=clip, **FULL)["data"]
        file.write_bytes(base64.b64decode(data))


@contextmanager
def chromium(profile: Path) -> Iterator[Page]:
    """Yield a browser with its own profile."""
    assert CHROMIUM is not None
    for_commands, commands = os.pipe()
    answers, for_answers = os.pipe()

    # the browser reads commands on 3 and writes answers to 4; whichever numbers they have now, out of the way first
    launcher = (
        "import fcntl, os, sys; own = [fcntl.fcntl(int(n), fcntl.F_DUPFD, 10) for n in sys.argv[1:3]]; "
        "os.dup2(own[0], 3); os.dup2(own[1], 4); os.execv(sys.argv[3], sys.argv[3:])"
    )
    command = [sys.executable, "-c", launcher, str(for_commands), str(for_answers), CHROMIUM, *FLAGS]
    browser = subprocess.Popen(
        [*command, f"--user-data-dir={profile}", "about:blank"],
        pass_fds=(for_commands, for_answers),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(for_commands)
    os.close(for_answers)
    try:
        yield Page(commands, answers)
    finally:
        os.close(commands)
        os.close(answers)
        browser.terminate()
        browser.wait(timeout=30)
