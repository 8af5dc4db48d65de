"""Headless Chromium, driven over its own protocol: real keys and clicks, and what the page then holds."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any
from urllib.request import urlopen

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Tab:
    """A page of a browser that shares nothing with the others."""

    def __init__(self, address: str) -> None:
        from websockets.sync.client import connect

        self._socket = ExitStack().enter_context(connect(address, max_size=None, open_timeout=60))
        self._ids = count(1)
        self.requested: list[str] = []
        """Every address that the page has asked for."""

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        id = next(self._ids)
        self._socket.send(json.dumps({"id": id, "method": method, "params": params}))
        while True:
            reply = json.loads(self._socket.recv(timeout=60))
            if reply.get("method") == "Network.requestWillBeSent":
                self.requested.append(reply["params"]["request"]["url"])
            if reply.get("id") == id:
                assert "error" not in reply, reply
                result: dict[str, Any] = reply["result"]
                return result

    def open(self, url: str) -> None:
        self.call("Page.enable")
        self.call("Network.enable")
        self.call("Page.navigate", url=url)
        self.until(f"location.href === {json.dumps(url)} && document.readyState === 'complete'")

    def js(self, expression: str) -> Any:
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, expression: str, seconds: float = 30) -> None:
        deadline = time.monotonic() + seconds
        while not self.js(f"Boolean({expression})"):
            assert time.monotonic() < deadline, f"never came: {expression}\n{self.js('document.body.innerText')}"
            time.sleep(0.02)

    def key(self, key: str, text: str | None = None) -> None:
        named = {"Escape": 27, "Enter": 13, "Tab": 9, "ArrowDown": 40, " ": 32}
        text = text if text is not None else {"Enter": "\r", " ": " "}.get(key, key if len(key) == 1 else "")
        code = named.get(key, ord(key[0].upper()))
        down = {"type": "keyDown", "key": key, "windowsVirtualKeyCode": code, **({"text": text} if text else {})}
        self.call("Input.dispatchKeyEvent", **down)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def click(self, selector: str) -> None:
        where = f"(() => {{ const n = document.querySelector({json.dumps(selector)}); n.scrollIntoView(); "
        where += "const b = n.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        x, y = self.js(where)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def resize(self, width: int, height: int) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=True)


class Browser:
    """Chromium in a folder of its own; ended with the `with`."""

    def __init__(self, folder: Path) -> None:
        assert CHROMIUM
        command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        command += ["--no-first-run", "--disable-background-networking", "--remote-debugging-port=0"]
        command += [f"--user-data-dir={folder}", "about:blank"]
        self._process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        told = folder / "DevToolsActivePort"
        for _ in range(600):
            if told.exists() and len(told.read_text().splitlines()) == 2:
                break
            time.sleep(0.1)
        self._port, path = told.read_text().splitlines()
        self._root = Tab(f"ws://127.0.0.1:{self._port}{path}")

    def tab(self) -> Tab:
        context = self._root.call("Target.createBrowserContext")["browserContextId"]
        target = self._root.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        with urlopen(f"http://127.0.0.1:{self._port}/json") as reply:
            pages = {page["id"]: page["webSocketDebuggerUrl"] for page in json.load(reply)}
        return Tab(pages[target])

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *error: object) -> None:
        os.killpg(self._process.pid, 9)
        self._process.wait()
