"""A headless Chromium that loads a page and takes a picture of it, over its DevTools protocol."""

from __future__ import annotations

import base64
import io
import itertools
import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

BROWSER = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None)
FLAGS = ("--headless", "--no-sandbox", "--remote-debugging-port=0", "--use-angle=swiftshader")


def picture_of(url: str, folder: Path, done: Callable[[np.ndarray], bool], seconds: float = 120) -> np.ndarray:
    """Load a page and return its picture `[H, W, 3]` once it is as wanted, or as it is when time is over.

    Args:
        url: The page.
        folder: For the browser's profile.
        done: Whether a picture is as wanted.
        seconds: Time that the page has.
    """
    from websockets.sync.client import connect

    assert BROWSER is not None
    flags = (*FLAGS, "--enable-unsafe-swiftshader", f"--user-data-dir={folder}", "--window-size=900,600")
    with subprocess.Popen([BROWSER, *flags, "about:blank"], stderr=subprocess.PIPE, text=True) as browser:
        try:
            assert browser.stderr is not None
            listening = next(line for line in browser.stderr if "DevTools listening on" in line)
            port = listening.split("ws://")[1].split("/")[0]
            with urllib.request.urlopen(f"http://{port}/json") as answer:
                pages = json.load(answer)
            address = next(page["webSocketDebuggerUrl"] for page in pages if page["type"] == "page")
            with connect(address, max_size=None) as socket:
                numbers = itertools.count(1)

                def call(method: str, **parameters: object) -> dict[str, Any]:
                    number = next(numbers)
                    socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
                    while (answer := json.loads(socket.recv())).get("id") != number:
                        pass
                    return answer["result"]

                call("Page.navigate", url=url)
                end = time.monotonic() + seconds
                while True:
                    time.sleep(1)
                    content = base64.b64decode(call("Page.captureScreenshot", format="png")["data"])
                    picture = np.array(Image.open(io.BytesIO(content)).convert("RGB"))
                    if done(picture) or time.monotonic() > end:
                        return picture
        finally:
            browser.terminate()
