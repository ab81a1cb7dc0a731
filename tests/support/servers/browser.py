"""A headless Chromium, driven over the two pipes of its DevTools protocol.

with Browser.start() as browser:
    page = browser.open("http://127.0.0.1:8000/")
    page.evaluate("document.title")
"""

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil
import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage", "--mute-audio")
PATIENCE = 60.0


class Browser:
    def __init__(self, sender: int, receiver: int) -> None:
        self._sender = sender
        self._receiver = receiver
        self._rest = b""
        self._number = 0
        self.events: list[dict[str, Any]] = []

    @staticmethod
    @contextmanager
    def start() -> Iterator["Browser"]:
        """Start Chromium; without one the test is skipped."""
        program = next(filter(None, map(shutil.which, NAMES)), None)
        if program is None:
            pytest.skip("no chromium is installed")
        from_test, to_browser = os.pipe()
        from_browser, to_test = os.pipe()
        with tempfile.TemporaryDirectory() as folder:
            # Chromium reads from descriptor 3 and writes to 4
            shell = f'exec 3<&{from_test} 4>&{to_test}; exec "$@"'
            command = [program, *FLAGS, "--remote-debugging-pipe", f"--user-data-dir={folder}"]
            process = subprocess.Popen(
                ["bash", "-c", shell, "bash", *command], pass_fds=(from_test, to_test), stderr=subprocess.DEVNULL
            )
            os.close(from_test)
            os.close(to_test)
            try:
                yield Browser(to_browser, from_browser)
            finally:
                os.close(to_browser)
                _kill(process)
                os.close(from_browser)

    def open(self, url: str, width: int = 1000, height: int = 700, dark: bool = False) -> "Page":
        target = self.call("Target.createTarget", {"url": "about:blank"})["targetId"]
        session = self.call("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        page = Page(self, session)
        for domain in ("Page", "Network", "Runtime", "Log"):
            page.call(f"{domain}.enable")
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        page.call("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page.call("Emulation.setEmulatedMedia", {"features": [scheme]})
        page.call("Page.navigate", {"url": url})
        page.wait_for("document.readyState === 'complete'")
        return page

    def call(self, method: str, parameters: dict[str, Any] | None = None, session: str | None = None) -> Any:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters or {}}
        message |= {"sessionId": session} if session else {}
        os.write(self._sender, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            found = os.read(self._receiver, 1 << 16)
            assert found, "chromium has ended"
            self._rest += found
        whole, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(whole))


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """Return when no process of Chromium can write into its folder anymore."""
    writers = psutil.Process(process.pid).children(recursive=True)
    for writer in writers:
        with suppress(psutil.NoSuchProcess):
            writer.kill()
    process.kill()
    process.wait()
    for writer in writers:
        # a container may have no init process that reaps them
        with suppress(psutil.NoSuchProcess):
            while writer.status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.01)


class Page:
    def __init__(self, browser: Browser, session: str) -> None:
        self._browser = browser
        self._session = session

    def call(self, method: str, parameters: dict[str, Any] | None = None) -> Any:
        return self._browser.call(method, parameters, self._session)

    def evaluate(self, expression: str) -> Any:
        """Return the JSON value of an expression."""
        asked = {"expression": expression, "returnByValue": True, "awaitPromise": True}
        found = self.call("Runtime.evaluate", asked)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait_for(self, condition: str) -> None:
        until = time.monotonic() + PATIENCE
        while not self.evaluate(condition):
            assert time.monotonic() < until, f"{condition} isn't true after {PATIENCE} seconds"
            time.sleep(0.02)

    def is_dark(self) -> bool:
        """Whether the text is brighter than the background."""
        back, text = (
            sum(map(int, self.evaluate(f"getComputedStyle(document.body).{name}.match(/\\d+/g)")[:3]))
            for name in ("backgroundColor", "color")
        )
        return text > back

    def type(self, selector: str, text: str) -> None:
        """Type a text into an element, and press Enter."""
        self.evaluate(f"document.querySelector({json.dumps(selector)}).focus()")
        self.call("Input.insertText", {"text": text})
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", {"type": kind, "key": "Enter", "code": "Enter", "text": "\r"})
