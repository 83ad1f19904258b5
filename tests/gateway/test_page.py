"""The page in headless Chromium: what it shows, by keyboard, without the gateway, with a key, on a phone."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from subprocess import Popen
from typing import Any

import pytest

from elastickv import _core
from elastickv.gateway.auth import Keys
from elastickv.gateway.states import State
from elastickv.gateway.stats import Stats
from elastickv.ledger import read_device
from gateway.browser import CONTRAST, browser, screenshot, visit
from gateway.page_server import ShownFleet, page_server
from gateway.views import model_view

pytestmark = pytest.mark.slow

MIB = 1 << 20
Tenant = Callable[..., AbstractContextManager[Popen[str]]]
SLEEP_OF_CHAT = "#models tr:first-child .actions button:first-child"
LIMIT_OF_CHAT = "#models tr:first-child .actions button:last-child"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as made:
        yield made


@pytest.fixture
def fleet() -> ShownFleet:
    now = time.time()
    return ShownFleet(
        model_view("chat", since=now - 60, outstanding=2, queued=1),
        model_view("code", State.ASLEEP, since=now - 5, reason="idle, and <b>chat</b> needs memory"),
        model_view("mail", State.FAILED, since=now - 5, reason="ended with code 1 before it served"),
    )


def expect(where: Any) -> Any:
    from playwright.sync_api import expect as made

    made.set_options(timeout=60_000)
    return made(where)


def some_requests() -> Stats:
    stats = Stats()
    for number in range(100):
        stats.arrived("chat", 10)
        stats.first_byte("chat", 0.010 * (number + 1))
        stats.produced("chat", 20)
        stats.finished("chat", 1.0, 21, 200 if number else 503, decode_s=0.4)
    return stats


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_everything_is_shown_at_every_width_in_every_light(
    chromium: Any, directory: Path, tenant: Tenant, fleet: ShownFleet, width: int, scheme: str, tmp_path: Path
) -> None:
    with (
        tenant("chat", blocks=10, cached=20),
        tenant("notebook", blocks=5),
        page_server(directory, fleet, some_requests()) as (url, _),
        visit(chromium, url, width=width, scheme=scheme) as seen,
    ):
        page = seen.page
        expect(page.locator("#link-text")).to_have_text("live")
        rows = page.locator("#models tr")
        expect(rows).to_have_count(3)
        expect(rows.nth(0)).to_contain_text("ready")
        expect(rows.nth(0)).to_contain_text("2, 1")
        expect(rows.nth(0)).to_contain_text("505 ms, 990 ms")
        expect(rows.nth(0)).to_contain_text("20 ms, 20 ms")
        expect(rows.nth(0)).to_contain_text(re.compile(r"in use, [\d.]+ (KiB|MiB) reclaimable"))
        expect(rows.nth(1)).to_contain_text("idle, and <b>chat</b> needs memory")  # text, never markup
        expect(rows.nth(2)).to_contain_text("ended with code 1 before it served")
        expect(page.locator("#summary")).to_contain_text("1 of 100 failed")
        expect(page.locator(".tenants")).to_contain_text("notebook")
        expect(page.locator(".device path.area").first).to_be_attached()
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "it scrolls sideways"
        ratio, where = page.evaluate(CONTRAST)
        assert ratio >= 4.5, where
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", ground)[:3])) < 200) == (scheme == "dark"), ground
        assert screenshot(page, tmp_path, f"{width}-{scheme}").stat().st_size > 10_000


def test_no_width_scrolls_sideways(chromium: Any, directory: Path, tenant: Tenant, fleet: ShownFleet) -> None:
    fleet.views["mail"] = replace(fleet.views["mail"], reason="/a/very/long/path" * 20)
    with (
        tenant("chat", blocks=10, cached=20),
        tenant("a-notebook-with-a-rather-long-name", blocks=5),
        page_server(directory, fleet, some_requests()) as (url, _),
        visit(chromium, url) as seen,
    ):
        expect(seen.page.locator("#models tr")).to_have_count(3)
        for width in (1920, 1100, 1060, 940, 880, 700, 600, 390, 320):
            seen.page.set_viewport_size({"width": width, "height": 800})
            assert seen.page.evaluate("document.documentElement.scrollWidth <= innerWidth"), width


def focus_by_tab(page: Any, selector: str) -> None:
    """As somebody without a mouse: Tab until it is there."""
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("selector => document.activeElement === document.querySelector(selector)", selector):
            return
    raise AssertionError(f"Tab does not come to {selector}")


def test_sleep_wake_and_limit_by_keyboard_alone(
    chromium: Any, directory: Path, tenant: Tenant, fleet: ShownFleet
) -> None:
    with (
        tenant("chat", blocks=10),
        page_server(directory, fleet) as (url, _),
        visit(chromium, url) as seen,
    ):
        page, keys = seen.page, seen.page.keyboard
        act = page.locator(SLEEP_OF_CHAT)
        expect(act).to_have_text("Sleep")
        focus_by_tab(page, SLEEP_OF_CHAT)
        keys.press("Enter")
        expect(page.locator("#ask-sleep")).to_contain_text("3 requests will end first")
        expect(page.locator("#ask-sleep .cancel")).to_be_focused()
        keys.press("Escape")  # nothing is done, and the focus is where it was
        expect(act).to_be_focused()
        assert fleet.calls == []
        keys.press("Enter")
        keys.press("Tab")
        keys.press("Enter")
        expect(page.locator("#said")).to_have_text("chat sleeps.")
        expect(act).to_have_text("Wake")
        expect(act).to_be_focused()
        keys.press("Enter")
        expect(act).to_have_text("Sleep")
        assert fleet.calls == [("sleep", "chat"), ("wake", "chat")]
        expect(page.locator("#events")).to_contain_text("ready → asleep")

        keys.press("Tab")
        expect(page.locator(LIMIT_OF_CHAT)).to_be_focused()
        keys.press("Enter")
        expect(page.locator("#limit-text")).to_be_focused()
        keys.press("Control+A")
        keys.type("lots")
        seen.failing = True  # the browser notes the 400 on its console
        keys.press("Enter")
        expect(page.locator("#limit-error")).to_contain_text("is not a size")
        keys.press("Control+A")
        keys.type("32MiB")
        keys.press("Enter")
        expect(page.locator("#said")).to_have_text("chat has a limit of 32 MiB.")
        expect(page.locator("#models tr").first).to_contain_text("limit 32 MiB")
        assert read_device(_core.Ledger.open(str(directory), "host")).tenant("chat").limit_held == 32 * MIB


def test_what_was_refused_is_said(chromium: Any, directory: Path, fleet: ShownFleet) -> None:
    fleet.refuse = "no memory for it: chat holds all of it"
    with page_server(directory, fleet) as (url, _), visit(chromium, url) as seen:
        seen.failing = True  # the browser notes the 503 on its console
        seen.page.locator("#models tr:nth-child(2) .actions button").first.click()
        expect(seen.page.locator("#said")).to_have_text("code did not wake: no memory for it: chat holds all of it")


def test_a_gateway_that_goes_and_comes_back(chromium: Any, directory: Path, fleet: ShownFleet) -> None:
    with page_server(directory, fleet) as (url, _):
        context = visit(chromium, url)
        seen = context.__enter__()
        expect(seen.page.locator("#link-text")).to_have_text("live")
        seen.failing = True
    page = seen.page
    try:
        expect(page.locator("#banner")).to_contain_text("No answer from the gateway")
        expect(page.locator("#banner")).to_contain_text("What you see is from")
        expect(page.locator("#link-text")).to_have_text("not connected")
        expect(page.locator("body")).to_have_class("stale")
        act = page.locator(SLEEP_OF_CHAT)
        expect(act).to_have_attribute("aria-disabled", "true")
        act.press("Enter")
        expect(page.locator("#ask-sleep")).to_be_hidden()
        with page_server(directory, fleet, port=int(url.rpartition(":")[2])):
            expect(page.locator("#link-text")).to_have_text("live")
            expect(page.locator("#banner")).to_be_hidden()
            expect(act).to_have_attribute("aria-disabled", "false")
    finally:
        context.__exit__(None, None, None)


def test_figures_that_grow_old_are_said_to_be_old(
    chromium: Any, directory: Path, fleet: ShownFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    with page_server(directory, fleet) as (url, watching), visit(chromium, url) as seen:
        expect(seen.page.locator("#link-text")).to_have_text("live")
        monkeypatch.setattr(watching._history, "look", lambda models: None)  # no sample from now on, and a minute later
        monkeypatch.setattr(watching._history, "_clock", lambda: time.time() + 60)
        expect(seen.page.locator("#banner")).to_contain_text("has read no ledger since")


def test_a_gateway_with_a_key(chromium: Any, directory: Path, fleet: ShownFleet) -> None:
    keys = Keys.of(admin="correct-battery")
    with page_server(directory, fleet, keys=keys) as (url, _), visit(chromium, url) as seen:
        seen.failing = True  # the browser notes each 401 on its console
        page = seen.page
        for key, after in (("wrong-battery", "the key is no admin key"), ("correct-battery", "")):
            page.locator("#banner button").click()
            expect(page.locator("#key-text")).to_be_focused()
            page.keyboard.type(key)
            page.keyboard.press("Enter")
            if after:
                expect(page.locator("#banner")).to_contain_text(after)
        expect(page.locator("#link-text")).to_have_text("live")
        expect(page.locator("#models tr")).to_have_count(3)
        assert "correct-battery" not in page.content()
        page.reload()
        expect(page.locator("#models tr")).to_have_count(3)  # of this tab, until it is closed


def test_the_chart_is_read_with_the_arrow_keys(
    chromium: Any, directory: Path, tenant: Tenant, fleet: ShownFleet
) -> None:
    with tenant("chat", blocks=16), page_server(directory, fleet) as (url, _), visit(chromium, url) as seen:
        page = seen.page
        chart = page.locator(".device .chart")
        note = page.locator(".device header .muted")
        expect(note).to_have_text(re.compile("^now: 1[.]?[0-9]* MiB of 64 MiB"))
        expect(chart).to_have_attribute("aria-valuemax", re.compile(r"^([2-9]|\d\d+)$"))
        chart.focus()
        page.keyboard.press("Home")
        expect(note).to_have_text(re.compile(r"^\d\d:\d\d:\d\d: "))
        expect(chart).to_have_attribute("aria-valuenow", "0")
        expect(chart).to_have_attribute("aria-valuetext", re.compile(r"chat \S+ \S+ in use"))
        page.keyboard.press("ArrowRight")
        expect(chart).to_have_attribute("aria-valuenow", "1")
        page.keyboard.press("Escape")
        expect(note).to_contain_text("now: ")


def test_the_chosen_theme_stays(chromium: Any, directory: Path, fleet: ShownFleet) -> None:
    with page_server(directory, fleet) as (url, _), visit(chromium, url, scheme="light") as seen:
        before = seen.page.evaluate("getComputedStyle(document.body).backgroundColor")
        seen.page.locator("#theme").select_option("dark")
        dark = seen.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert dark != before
        seen.page.reload()
        expect(seen.page.locator("#theme")).to_have_value("dark")
        assert seen.page.evaluate("getComputedStyle(document.body).backgroundColor") == dark


def test_a_gateway_without_models_or_devices(chromium: Any, directory: Path) -> None:
    with page_server(directory, ShownFleet()) as (url, _), visit(chromium, url, width=390) as seen:
        expect(seen.page.locator("#no-models")).to_be_visible()
        expect(seen.page.locator("#devices")).to_contain_text("No device yet")
        expect(seen.page.locator("#events")).to_contain_text("Nothing has moved yet")
