"""A page in headless Chromium, through the DevTools protocol over a pipe: no driver, no port, no network."""

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
# the browser reads commands on 3 and writes answers to 4; whichever numbers they have now, out of the way first
LAUNCHER = (
    "import fcntl, os, sys; own = [fcntl.fcntl(int(n), fcntl.F_DUPFD, 10) for n in sys.argv[1:3]]; "
    "os.dup2(own[0], 3); os.dup2(own[1], 4); os.execv(sys.argv[3], sys.argv[3:])"
)


class Page:
    """One tab. `complaints`: what went to the console since `show`; `requests`: the addresses that it asked for."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers, self._buffer, self._count = commands, answers, b"", 0
        self._session: dict[str, str] = {}
        self.complaints: list[str] = []
        self.requests: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = {"sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Log", "Runtime", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Return the result of one command, and record the events before it."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters, **self._session}
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        answer: dict[str, Any] = {}
        while answer.get("id") != self._count:
            while b"\0" not in self._buffer:
                more = os.read(self._answers, 1 << 20)
                assert more, "Chromium has ended"
                self._buffer += more
            line, _, self._buffer = self._buffer.partition(b"\0")
            answer = json.loads(line)
            match answer.get("method"):
                case "Log.entryAdded" | "Runtime.exceptionThrown" | "Runtime.consoleAPICalled":
                    self.complaints.append(json.dumps(answer["params"]))
                case "Network.requestWillBeSent":
                    self.requests.append(answer["params"]["request"]["url"])
        assert "error" not in answer, answer
        result: dict[str, Any] = answer["result"]
        return result

    def show(self, file: Path, width: int, scheme: str) -> None:
        """Load a file at a width in CSS pixels in the light or dark scheme, and wait until it is loaded."""
        self.complaints.clear()
        self.requests.clear()
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Page.navigate", url=file.resolve().as_uri())
        while self.value("document.readyState") != "complete":
            time.sleep(0.02)

    def value(self, expression: str) -> Any:
        """Return the value of an expression; the page's policy does not apply to DevTools."""
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")


@contextmanager
def chromium(profile: Path) -> Iterator[Page]:
    """Yield a browser with its own profile."""
    assert CHROMIUM is not None
    (for_commands, commands), (answers, for_answers) = os.pipe(), os.pipe()
    launcher = [sys.executable, "-c", LAUNCHER, str(for_commands), str(for_answers)]
    browser = subprocess.Popen(
        [*launcher, CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
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
