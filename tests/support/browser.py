"""A real headless Chromium that says what a page did: requests, console, screenshots."""

from __future__ import annotations

import asyncio
import base64
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-port=0",
    "--remote-allow-origins=*",
)
START_S = 90.0
ANSWER_S = 60.0


def chromium() -> str | None:
    """The browser's path; None where there is none."""
    return shutil.which("chromium") or shutil.which("chromium-browser")


@dataclass
class Visit:
    """What a page did while it was open."""

    requests: list[str] = field(default_factory=list)
    """Addresses of everything that it asked for, itself first."""
    complaints: list[str] = field(default_factory=list)
    """Console errors and warnings, uncaught exceptions, entries of the browser's log."""
    answers: dict[str, Any] = field(default_factory=dict)
    """Values of the expressions that were asked for."""
    screenshots: dict[int, bytes] = field(default_factory=dict)
    """PNG of the whole page by width."""


@contextmanager
def browser(profile: Path) -> Iterator[str]:
    """Runs Chromium with an empty profile; yields the address of its debugger."""
    program = chromium()
    assert program is not None, "no chromium on this machine (Debian: chromium)"
    log = profile.with_suffix(".log")
    with log.open("wb") as stream:
        command = [program, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        process = subprocess.Popen(command, stdout=stream, stderr=stream, start_new_session=True)
        try:
            port_file = profile / "DevToolsActivePort"
            deadline = time.monotonic() + START_S
            while not (port_file.is_file() and "\n" in port_file.read_text()):
                assert process.poll() is None, log.read_text(errors="replace")
                assert time.monotonic() < deadline, log.read_text(errors="replace")
                time.sleep(0.05)
            yield f"http://127.0.0.1:{port_file.read_text().splitlines()[0]}"
        finally:
            # Its helper processes are in the same group, which is ours alone.
            os.killpg(process.pid, 15)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
                process.wait(10)


def visit(debugger: str, page: Path, *, widths: tuple[int, ...], ask: dict[str, str]) -> Visit:
    """Opens a page at each width in turn.

    Args:
        debugger: What `browser` yielded.
        page: A file.
        widths: Widths of the window; at each a screenshot of the whole page is taken.
        ask: JavaScript expressions by name, evaluated in order at the first width.
    """
    return asyncio.run(_visit(debugger, page, widths, ask))


async def _visit(debugger: str, page: Path, widths: tuple[int, ...], ask: dict[str, str]) -> Visit:
    found = Visit()
    async with aiohttp.ClientSession() as session:
        async with session.put(f"{debugger}/json/new?about:blank") as answer:
            target = await answer.json()
        address = target["webSocketDebuggerUrl"]
        async with session.ws_connect(address, max_msg_size=1 << 28) as socket:
            talk = _Talk(socket, found)
            for domain in ("Page", "Network", "Runtime", "Log"):
                await talk.call(f"{domain}.enable")
            await talk.size(widths[0])
            await talk.call("Page.navigate", url=page.resolve().as_uri())
            await talk.until("Page.loadEventFired")
            for name, expression in ask.items():
                found.answers[name] = await talk.evaluate(expression)
            for width in widths:
                await talk.size(width)
                shot = await talk.call(
                    "Page.captureScreenshot", format="png", captureBeyondViewport=True
                )
                found.screenshots[width] = base64.b64decode(shot["data"])
            # What the page did last has been heard once this answer is there.
            await talk.evaluate("new Promise(done => setTimeout(done, 200))")
        async with session.get(f"{debugger}/json/close/{target['id']}") as answer:
            await answer.read()
    return found


class _Talk:
    """One page's debugger connection."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse, found: Visit) -> None:
        self._socket = socket
        self._found = found
        self._number = 0
        self._events: list[str] = []

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Sends a command and waits for its answer."""
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": parameters})
        while True:
            message = await self._receive()
            if message.get("id") == self._number:
                assert "error" not in message, (method, message)
                return dict(message["result"])

    async def until(self, event: str) -> None:
        """Waits for an event, unless it has come already."""
        while event not in self._events:
            await self._receive()

    async def size(self, width: int) -> None:
        """Sets the window's width."""
        await self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=width < 600,
        )

    async def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, a promise's when it is one."""
        answer = await self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, (expression, answer)
        return answer["result"].get("value")

    async def _receive(self) -> dict[str, Any]:
        message: dict[str, Any] = await self._socket.receive_json(timeout=ANSWER_S)
        method, details = message.get("method", ""), message.get("params", {})
        self._events.append(method)
        if method == "Network.requestWillBeSent":
            self._found.requests.append(details["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self._found.complaints.append(str(details["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and details["type"] in ("error", "warning"):
            self._found.complaints.append(str(details["args"]))
        elif method == "Log.entryAdded":
            self._found.complaints.append(str(details["entry"]))
        return message
