"""The book, rendered once for all tests that look at it, and the browser that opens it."""
from __future__ import annotations

import functools
import http.server
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.catalog import ROOT

BOOK = ROOT / "book"
CHROME = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]


@pytest.fixture(scope="session")
def rendered(tmp_path_factory) -> Path:
    """The folder of the HTML, built from nothing; warnings are errors."""
    output = tmp_path_factory.mktemp("book")
    done = subprocess.run([sys.executable, str(BOOK / "build.py"), "--output", str(output)], text=True,
                          capture_output=True, timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stdout + done.stderr
    return output / "_build" / "html"


@pytest.fixture(scope="session")
def server(rendered: Path) -> Iterator[str]:
    """Address of a local server of the book."""
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=rendered)) as http_server:
        thread = threading.Thread(target=http_server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{http_server.server_port}"
        http_server.shutdown()
        thread.join(5)


@pytest.fixture(scope="session")
def browser() -> Iterator:
    """An installed Chromium or Chrome under playwright, which downloads none."""
    from playwright.sync_api import sync_playwright

    found = [os.environ.get("CHROMIUM"), shutil.which("chromium"), shutil.which("google-chrome"), CHROME]
    program = next((path for path in found if path and Path(path).exists()), None)
    if program is None:
        pytest.skip("needs Chromium or Chrome (apt-get install chromium)")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program, args=FLAGS)
        yield chromium
        chromium.close()
