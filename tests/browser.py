"""A headless Chromium over its debugging pipe, with the standard library alone; the skip where there is none."""

import base64
import fcntl
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome-headless-shell")
FLAGS = ["--headless", "--no-sandbox", "--no-zygote", "--single-process", "--disable-gpu", "--disable-dev-shm-usage"]
SECONDS = 30


class Browser:
    """Opens a page and evaluates expressions in it."""

    def __init__(self, folder: Path) -> None:
        program = os.environ.get("ZOO_BROWSER") or next(filter(None, map(shutil.which, NAMES)), None)
        if program is None:
            pytest.skip("no Chromium here to open the page with (set ZOO_BROWSER to its program)")
        # It reads commands from its file 3 and answers on its file 4; ours must not be either.
        (theirs_in, self.write), (self.read, theirs_out) = (
            tuple(fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in os.pipe()) for _ in range(2)
        )

        def connect() -> None:
            os.dup2(theirs_in, 3)
            os.dup2(theirs_out, 4)

        words = [program, *FLAGS, "--remote-debugging-pipe", f"--user-data-dir={folder}"]
        quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(words, preexec_fn=connect, pass_fds=(3, 4), **quiet)
        os.close(theirs_in)
        os.close(theirs_out)
        os.set_blocking(self.read, False)
        self.left, self.number, self.session = b"", 0, ""

    def open(self, page: Path | str) -> None:
        """Open a file, or an address."""
        address = page.as_uri() if isinstance(page, Path) else page
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Page.navigate", url=address)
        self.until("document.readyState + location.protocol", "complete" + address.partition("//")[0])

    def value(self, expression: str) -> Any:
        """Evaluate an expression in the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, expression: str, value: Any = True) -> None:
        """Wait until an expression has a value."""
        end = time.monotonic() + SECONDS
        while (found := self.value(expression)) != value:
            assert time.monotonic() < end, f"{expression} is {found!r}, not {value!r}"
            time.sleep(0.05)

    def upload(self, selector: str, file: Path) -> None:
        """Choose a file in the file input that a CSS selector finds."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(file)])

    def size(self, width: int, height: int) -> None:
        """Set the size of the page, in pixels."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def shoot(self, file: Path) -> None:
        """Save the whole page as a PNG."""
        found = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(found["data"]))

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            part, found, rest = self.left.partition(b"\0")
            if found:
                self.left, answer = rest, json.loads(part)
                if answer.get("id") == self.number:
                    assert "error" not in answer, answer
                    return answer["result"]
                continue
            try:
                self.left += os.read(self.read, 1 << 20)
            except BlockingIOError:
                assert self.process.poll() is None, f"the browser ended with {self.process.returncode}"
                time.sleep(0.01)
        raise TimeoutError(f"no answer to {method} in {SECONDS} s")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.write)
        os.close(self.read)
