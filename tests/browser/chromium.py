"""A headless Chromium driven over its debugging pipe: standard library only, no driver package, no
port.

`--remote-debugging-pipe` speaks JSON messages that end in a zero byte: commands go in on descriptor
3, answers and events come out on descriptor 4.
"""

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

TIMEOUT_S = 60.0
FLAGS = (
    "--headless",
    "--no-sandbox",  # containers run as root
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)


def find_chromium() -> str | None:
    """Debian's package first, then what others call it. One that can not say its version (Ubuntu's
    stub without its snap) is none."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((found for name in names if (found := shutil.which(name)) and answers(found)), None)


def answers(binary: str) -> bool:
    try:
        return (
            subprocess.run([binary, "--version"], capture_output=True, timeout=TIMEOUT_S).returncode
            == 0
        )
    except (OSError, subprocess.TimeoutExpired):
        return False


class Chromium:
    """One browser with one page. `events` holds everything the page said since it was opened."""

    def __init__(self, binary: str, profile: Path) -> None:
        self.binary, self.profile = binary, profile
        self.events: list[dict[str, Any]] = []
        self.pending, self.last_id, self.session = b"", 0, ""

    def __enter__(self) -> Self:
        child_in, self.to_child = os.pipe()
        self.from_child, child_out = os.pipe()
        # bash puts the two ends where Chromium looks for them, by way of numbers that neither of
        # them has.
        line = f'exec 8<&{child_in} 9>&{child_out}; exec 3<&8 4>&9; exec "$@"'
        args = [self.binary, *FLAGS, f"--user-data-dir={self.profile}", "about:blank"]
        self.process = subprocess.Popen(
            ["bash", "-c", line, "bash", *args],
            pass_fds=(child_in, child_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(child_in)
        os.close(child_out)
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.process.terminate()
        self.process.wait(TIMEOUT_S)
        os.close(self.to_child)
        os.close(self.from_child)

    def send(self, method: str, **params: object) -> dict[str, Any]:
        """One command, and its answer."""
        self.last_id += 1
        message = {"id": self.last_id, "method": method, "params": params} | (
            {"sessionId": self.session} if self.session else {}
        )
        os.write(self.to_child, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            answer = self.receive(deadline)
            if answer.get("id") == self.last_id:
                assert "error" not in answer, f"{method}: {answer['error']}"
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)

    def receive(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self.pending:
            ready, _, _ = select.select(
                [self.from_child], [], [], max(0.0, deadline - time.monotonic())
            )
            assert ready, f"chromium said nothing for {TIMEOUT_S:g} s"
            data = os.read(self.from_child, 1 << 20)
            assert data, f"chromium ended with {self.process.poll()}"
            self.pending += data
        message, _, self.pending = self.pending.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found

    def wait_for(self, method: str) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not any(event.get("method") == method for event in self.events):
            self.events.append(self.receive(deadline))

    def open(self, url: str, width: int, height: int = 900, scheme: str = "light") -> None:
        """The page at a width, as a phone would show it below 500 pixels; returns when it is
        loaded."""
        self.events.clear()
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 500,
        )
        self.send(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": scheme}],
        )
        self.send("Page.navigate", url=url)
        self.wait_for("Page.loadEventFired")

    def evaluate(self, expression: str) -> Any:
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def complaints(self) -> list[str]:
        """What a person would find in the console: errors, warnings, exceptions, policy
        violations."""
        found = []
        for event in self.events:
            params = event.get("params", {})
            if event["method"] == "Runtime.exceptionThrown":
                found.append(str(params["exceptionDetails"]))
            elif event["method"] == "Log.entryAdded" and params["entry"]["level"] in (
                "error",
                "warning",
            ):
                found.append(params["entry"]["text"])
            elif event["method"] == "Runtime.consoleAPICalled":
                found.append(f"{params['type']}: {params['args']}")
        return found

    def requested(self) -> list[str]:
        """Every address that the page asked for, itself included, except what it carries inline."""
        urls = [
            e["params"]["request"]["url"]
            for e in self.events
            if e["method"] == "Network.requestWillBeSent"
        ]
        return [url for url in urls if not url.startswith("data:")]

    def screenshot(self, path: Path) -> None:
        """The whole page, from top to bottom."""
        shot = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))
