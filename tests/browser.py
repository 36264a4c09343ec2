"""A headless Chromium for the tests of pages: opened from disk, asked through its own protocol.

MINIDIFF_BROWSER names the browser; then a missing one is a failure, not a skip. Default: chromium
or chrome, where the machine has one. The protocol (chromedevtools.github.io/devtools-protocol) runs
over two pipes, so that no port is open.
"""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --no-first-run --disable-extensions --hide-scrollbars "
    "--disable-background-networking --disable-component-update --disable-sync --disable-breakpad "
    "--disable-dev-shm-usage --remote-debugging-pipe"
).split()


def browser_path() -> str:
    """The browser's program; where there is none, the test is skipped, or fails if one was named."""
    named = os.environ.get("MINIDIFF_BROWSER")
    path = shutil.which(named) if named else next(filter(None, map(shutil.which, NAMES)), None)
    if path is None and named:
        pytest.fail(f"MINIDIFF_BROWSER={named}: no such program")
    if path is None:
        pytest.skip("no Chromium here; MINIDIFF_BROWSER names one")
    return path


class Browser:
    """One tab. `errors` holds what the console and the page's scripts complained of; `requests`,
    the addresses that were asked for."""

    def __init__(self, profile: Path):
        (reads, self._write), (self._read, writes) = os.pipe(), os.pipe()
        command = [browser_path(), *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        # the protocol's ends of the pipes are to be descriptors 3 and 4 of the browser
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (reads, writes)]
        shell = ["bash", "-c", 'exec "$@" 3<&{} 4>&{}'.format(*ends), "bash", *command]
        self._process = subprocess.Popen(shell, pass_fds=ends, stderr=subprocess.DEVNULL)
        for end in (reads, writes, *ends):
            os.close(end)
        self._buffer, self._count, self._session = b"", 0, None
        self.errors: list[str] = []
        self.requests: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command of the protocol and its result."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._count:
            self._note(answer)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def _next(self, seconds: float = 60) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready = select.select([self._read], [], [], seconds)[0]
            part = os.read(self._read, 1 << 20) if ready else b""
            assert part, "the browser does not answer"
            self._buffer += part
        message, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        method, params = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description", details["text"]))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
            self.errors.append(" ".join(str(arg.get("value")) for arg in params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.errors.append(params["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])

    def open(self, page: Path, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """A page from disk, in a window of this size in CSS pixels."""
        self.errors, self.requests = [], []
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=page.resolve().as_uri())
        self.wait("document.readyState === 'complete' && location.protocol === 'file:'")

    def run(self, script: str, by_value: bool = True) -> Any:
        """The value of a JavaScript expression in the page."""
        how = {"returnByValue": by_value, "awaitPromise": True, "userGesture": True}
        result = self.call("Runtime.evaluate", expression=script, **how)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def act(self, script: str) -> None:
        """The same without its value, which may be large."""
        self.run(script, by_value=False)

    def wait(self, script: str, seconds: float = 60) -> None:
        """Until the expression is true."""
        end = time.monotonic() + seconds
        while not self.run(script):
            assert time.monotonic() < end, f"never true: {script}"
            time.sleep(0.05)

    def press(self, key: str) -> None:
        """A key of the keyboard, such as Tab, Enter, ArrowRight or " "."""
        codes = {"Tab": 9, "Enter": 13, " ": 32, "ArrowLeft": 37, "ArrowRight": 39, "Escape": 27}
        event = {"key": key, "code": "Space" if key == " " else key}
        event["windowsVirtualKeyCode"] = codes[key]
        text = {"text": {"Enter": "\r", " ": " "}[key]} if key in ("Enter", " ") else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", **event, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    def screenshot(self, file: Path) -> None:
        """The whole page, below the window's edge too."""
        image = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        file.write_bytes(base64.b64decode(image))

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(timeout=30)
        os.close(self._read)
        os.close(self._write)
