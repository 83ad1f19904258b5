"""Headless Chromium for tests of the page: where it is, how it is started, what it must not do."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
PATIENCE_MS = 60_000

# The least contrast of text with what is behind it, by WCAG 2.2 (4.5 for text of this size), and where that is.
CONTRAST = """
() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const part = (value) => (value <= 10.3 ? value / 255 / 12.92 : ((value / 255 + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b);
  const behind = (node) => {
    for (let at = node; at; at = at.parentElement) {
      const colour = rgba(getComputedStyle(at).backgroundColor);
      if (colour[3] > 250) return colour;
    }
    return [255, 255, 255, 255];
  };
  let least = [99, ""];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !node.checkVisibility()) continue;
    if (node.closest("svg, .hidden, .skip, noscript")) continue;
    const style = getComputedStyle(node);
    const [one, other] = [light(rgba(style.color)), light(behind(node))];
    const ratio = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
    if (ratio < least[0]) least = [ratio, `${walker.currentNode.data.trim()} in ${node.className || node.tagName}`];
  }
  return least;
}
"""


def chromium_path() -> str:
    """Where Chromium is. Skips the test where there is none, and fails it in CI, where there must be one."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        text = f"no Chromium here: none of {', '.join(NAMES)} is on the path; install Debian's package chromium"
        if os.environ.get("CI"):
            pytest.fail(text)
        pytest.skip(text)
    return found


@contextmanager
def browser() -> Iterator[Any]:
    """One with a profile of its own, which goes with it."""
    path = chromium_path()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        made = driver.chromium.launch(executable_path=path, args=list(ARGUMENTS), timeout=PATIENCE_MS)
        try:
            yield made
        finally:
            made.close()


@dataclass
class Visit:
    """A page that was opened, and what it did that it must not do."""

    page: Any
    url: str
    complaints: list[str] = field(default_factory=list)
    strangers: list[str] = field(default_factory=list)
    failing: bool = False
    """While the gateway refuses or is away on purpose: the browser says so on its console."""

    def listen(self) -> None:
        """From now on."""
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", self._request)

    def _console(self, message: Any) -> None:
        if message.type in ("error", "warning") and not (self.failing and "Failed to load resource" in message.text):
            self.complaints.append(message.text)

    def _request(self, request: Any) -> None:
        if urlsplit(request.url).netloc != urlsplit(self.url).netloc:
            self.strangers.append(request.url)


@contextmanager
def visit(chromium: Any, url: str, *, width: int = 1280, scheme: str = "light") -> Iterator[Visit]:
    """The page in a context of its own (no cookies, no storage). Afterwards: no complaint, no stranger."""
    context = chromium.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    context.set_default_timeout(PATIENCE_MS)
    made = Visit(context.new_page(), url)
    made.listen()
    made.page.goto(url)
    try:
        yield made
    finally:
        context.close()
    assert made.complaints == [], made.complaints
    assert made.strangers == [], made.strangers


def screenshot(page: Any, folder: Path, name: str) -> Path:
    """The whole page, for whoever wants to see what a test saw."""
    path = folder / f"{name}.png"
    page.screenshot(path=str(path), full_page=True)
    return path
