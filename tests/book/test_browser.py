"""The book as a reader meets it: a real browser, both themes, phone and desktop, keyboard, search, axe-core."""
from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe

from shared import catalog, records

KINDS = {"landing": "index", "part": "part1", "chapter": "ch04/index", "section": "ch04/s4_04",
         "module": "ch04/collectives", "claims": "claims", "libraries": "libraries", "threads": "threads/index",
         "thread": "threads/all_to_all", "glossary": "glossary", "errata": "errata"}
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


@pytest.fixture(params=["http", "file"])
def address(request, server: str, rendered: Path) -> str:
    return server if request.param == "http" else rendered.as_uri()


@pytest.fixture
def open_page(browser, server: str, rendered: Path) -> Iterator:
    """A function that opens pages; whatever goes wrong in any of them fails the test at its end."""
    troubles, contexts = [], []

    def opened(viewport: dict = DESKTOP, theme: str = "light"):
        context = browser.new_context(viewport=viewport, color_scheme=theme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: troubles.append(f"{message.type}: {message.text} ({page.url})")
                if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("requestfailed", lambda request: troubles.append(f"{request.failure}: {request.url}")
                if request.failure != "net::ERR_ABORTED" else None)  # excerpts on their way when the reader leaves
        page.on("request", lambda request: troubles.append(f"asked for {request.url}") if not request.url.startswith(
            (server, rendered.as_uri(), "data:")) else None)
        page.on("response", lambda response: troubles.append(f"{response.status}: {response.url}")
                if response.status >= 400 else None)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not troubles, troubles[:10]


def go(page, address: str, name: str) -> None:
    page.goto(f"{address}/{name}.html")
    page.wait_for_load_state("load")


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_no_page_is_wider_than_the_window(open_page, server, viewport) -> None:
    page = open_page(viewport)
    names = [*KINDS.values(), *(f"ch04/s4_{i:02d}" for i in range(1, 11)), "ch04/exercises", "search"]
    for name in names:
        go(page, server, name)
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= viewport["width"], f"{name} is {width} px wide"


def test_from_the_landing_page_to_a_section(open_page, address) -> None:
    page = open_page()
    go(page, address, "index")
    page.get_by_role("article").get_by_role("link", name="Foundations of Distributed AI").click()
    page.get_by_role("article").get_by_role("link", name="Chapter 4: Communication Primitives").click()
    assert page.locator("h1").last.inner_text().startswith("Chapter 4: Communication Primitives")
    page.locator("nav.book-nav").get_by_role("link", name="4.4 All-Reduce Algorithms").click()
    assert page.locator("article h1").inner_text().startswith("4.4 All-Reduce Algorithms")
    assert page.locator("nav.book-nav a[aria-current=page]").inner_text().startswith("4.4")
    recorded = records.load("4.4")["scripts"][0]["result"]
    assert recorded["tables"][0]["rows"][0][1] in page.locator("article").inner_text()
    claims = page.locator("section#what-it-claims table tbody tr")
    assert claims.count() == len(recorded["claims"])


def test_search_finds_all_reduce_and_its_hit_can_be_followed(open_page, address) -> None:
    page = open_page()
    go(page, address, "index")
    page.keyboard.press("Control+k")
    field = page.locator("dialog input[type=search], #pst-search-dialog input[type=search]").first
    field.fill("all-reduce")
    field.press("Enter")
    hits = page.locator("#search-results li a")
    ours = hits.filter(has_text=re.compile(r"^4\.4")).first  # hits come in one by one
    ours.wait_for(timeout=15_000)
    ours.click()
    page.wait_for_url("**/s4_04.html*")
    assert page.locator("article h1").inner_text().startswith("4.4")


def test_the_theme_can_be_changed_and_figures_follow(open_page, address) -> None:
    page = open_page()
    go(page, address, "ch04/s4_04")

    def look() -> tuple[str, str, str]:
        return tuple(page.evaluate("""() => [getComputedStyle(document.body).backgroundColor,
            getComputedStyle(document.querySelector('figure.drawn svg text')).fill,
            document.documentElement.dataset.theme]"""))

    seen = {look()}
    for _ in range(3):
        page.locator("button.theme-switch-button").first.click()
        page.wait_for_timeout(150)
        seen.add(look())
    themes = {theme: (background, ink) for background, ink, theme in seen}
    assert themes.keys() == {"light", "dark"}
    assert themes["light"][0] != themes["dark"][0] and themes["light"][1] != themes["dark"][1]


def test_listings_and_solutions_unfold(open_page, address) -> None:
    page = open_page()
    go(page, address, "ch04/s4_04")
    solution = page.locator("details.solution").first
    code = solution.locator("pre").first
    assert not code.is_visible()
    solution.locator("summary").click()
    assert code.is_visible() and "def halving_doubling" in code.inner_text()
    whole = page.locator("details", has_text="The whole demo").first
    whole.locator("summary").focus()
    page.keyboard.press("Enter")
    assert whole.locator("pre").first.is_visible() and "def race(" in whole.inner_text()


def test_the_claims_can_be_filtered(open_page, address) -> None:
    page = open_page()
    go(page, address, "claims")
    claims = [claim for section in catalog.sections() if section.demo
              for entry in records.load(section.number)["scripts"] for claim in entry["result"]["claims"]]
    shown = page.locator("#claims tbody tr:visible")
    count = page.locator("#claims-filter output")
    assert shown.count() == len(claims) and count.inner_text() == f"{len(claims)} of {len(claims)}"
    page.get_by_label("Kind").select_option("timing")
    timing = sum(claim["timing"] for claim in claims)
    assert shown.count() == timing and count.inner_text() == f"{timing} of {len(claims)}"
    page.get_by_label("Kind").select_option("")
    page.get_by_label("Words").fill("RING exactly")
    texts = [text.lower() for text in shown.all_inner_texts()]
    assert texts and all("ring" in text and "exactly" in text for text in texts)
    page.get_by_label("Words").fill("no such claim")
    assert shown.count() == 0
    page.get_by_label("Words").fill("")
    page.get_by_label("Verdict").select_option("FAILED")
    assert shown.count() == sum(not claim["holds"] for claim in claims)
    page.get_by_label("Verdict").select_option("")
    page.get_by_label("Chapter").select_option("4")
    assert shown.count() == sum(len(entry["result"]["claims"]) for section in catalog.find("4")
                                for entry in records.load(section.number)["scripts"])


def test_the_keyboard_reaches_search_contents_and_text(open_page, server) -> None:
    page = open_page()
    go(page, server, "ch04/s4_04")
    reached = []
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("""() => { const e = document.activeElement;
            return [e.className, e.textContent.trim(), e.closest('nav.book-nav') ? '(contents)' : '',
                    e.closest('article') ? '(article)' : ''].join(' ') }"""))
    where = " / ".join(reached)
    assert "search-button" in where and "(contents)" in where and "(article)" in where
    assert "Skip to main content" in reached[0]


def test_on_a_phone_the_contents_open_and_lead_on(open_page, server) -> None:
    page = open_page(PHONE)
    go(page, server, "ch04/s4_04")
    nav = page.locator("nav.book-nav")
    page.locator("button.primary-toggle").first.click()
    link = nav.get_by_role("link", name="4.5 All-Gather")
    link.wait_for(state="visible")
    link.click()
    page.wait_for_url("**/s4_05.html")


def test_printed_pages_show_what_was_folded_and_no_furniture(open_page, server) -> None:
    page = open_page()
    go(page, server, "ch04/s4_04")
    page.emulate_media(media="print")
    assert page.locator("details.solution pre").first.is_visible()
    for furniture in ("nav.book-nav", ".bd-header-article", ".bd-sidebar-secondary"):
        assert not page.locator(furniture).first.is_visible(), furniture


@pytest.mark.parametrize(("viewport", "theme"), [(DESKTOP, "light"), (DESKTOP, "dark"), (PHONE, "dark")],
                         ids=["desktop-light", "desktop-dark", "phone-dark"])
def test_axe_finds_nothing_serious(open_page, server, viewport, theme) -> None:
    page, found = open_page(viewport, theme), []
    for kind, name in KINDS.items():
        go(page, server, name)
        assert page.evaluate("document.documentElement.dataset.theme") == theme
        page.add_style_tag(content="* { transition: none !important }")  # halfway to the dark no contrast is right
        for violation in Axe().run(page, options={"preload": False}).response["violations"]:
            if violation["impact"] in ("serious", "critical"):
                where = [f"{node['html'][:160]} {node.get('failureSummary', '')[:200]}" for node in violation["nodes"]]
                found.append(f"{kind}: {violation['id']} ({len(where)}): {json.dumps(where[:2])}")
    assert not found, "\n".join(found)
