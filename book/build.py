"""Renders the book: pages from the repository and its recorded results, then HTML from the pages by jupyter-book.

Pages are written to book/_build/source, HTML to book/_build/html. A page is written only when its text changed, so a
second build renders what changed; everything is rendered anew when the contents, the configuration or a template did.
Warnings are errors.
"""
from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[0] = str(HERE.parent)  # run as a script, from anywhere

import yaml  # noqa: E402

from book.contents import Book  # noqa: E402
from book.figures import svg  # noqa: E402
from book.pages import contents, navigation, pages  # noqa: E402
from shared.errors import MissingDependency, ReaderError  # noqa: E402
from shared.terminal import guarded  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--fresh", action="store_true", help="render every page anew")
    parser.add_argument("--output", type=Path, default=HERE, help="folder in which _build is made (default: book)")
    given = parser.parse_args()
    begin = time.perf_counter()
    changed, total = write(Book(), given.output)
    print(f"{total} pages, {changed} written in {time.perf_counter() - begin:.1f} s", flush=True)
    render(given.output, given.fresh)
    print(f"{given.output / '_build' / 'html' / 'index.html'}  ({time.perf_counter() - begin:.1f} s)")
    return 0


def write(book: Book, output: Path) -> tuple[int, int]:
    """Write the pages and what Sphinx needs beside them; how many files changed, how many pages there are."""
    if mistakes := book.mistakes():
        raise ReaderError("; ".join(mistakes))
    source, cache = output / "_build" / "source", output / "_build" / "figures"
    files = {f"{name}.md": text for name, text in pages(book, lambda script, result: svg(script, result, cache))}
    total = len(files)
    files["_toc.yml"] = yaml.safe_dump(contents(book), sort_keys=False, allow_unicode=True, width=200)
    files["_config.yml"] = (HERE / "config.yml").read_text(encoding="utf-8")
    files["favicon.svg"] = (HERE / "assets" / "favicon.svg").read_text(encoding="utf-8")
    files["navigation.json"] = json.dumps(navigation(book), ensure_ascii=False)
    changed = sum(_write_if_new(source / name, text.encode()) for name, text in files.items())
    for path in source.rglob("*.md"):
        if path.relative_to(source).as_posix() not in files:
            path.unlink()
    return changed, total


def render(output: Path, fresh: bool = False) -> None:
    """Run jupyter-book on the pages. ReaderError with its warnings if there is any."""
    source, html, state = (output / "_build" / name for name in ("source", "html", "rendered.sha256"))
    now = _frame(source)
    if fresh or not state.exists() or state.read_text() != now:
        shutil.rmtree(html, ignore_errors=True)
        shutil.rmtree(output / "_build" / ".doctrees", ignore_errors=True)
    state.unlink(missing_ok=True)
    command = [str(Path(sys.executable).with_name("jupyter-book")), "build", str(source), "--path-output", str(output),
               "-W", "--keep-going", "-q"]
    environment = os.environ | {"PYTHONPATH": str(HERE.parent), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        print(done.stdout, file=sys.stderr)
        raise ReaderError("jupyter-book failed or warned; what it said stands above")
    for asset in sorted(path for path in (HERE / "assets").rglob("*") if path.is_file()):
        _write_if_new(html / "_static" / "book" / asset.relative_to(HERE / "assets"), asset.read_bytes())
    _write_if_new(html / "_static" / "book" / "tex-svg.js", mathjax().read_bytes())
    state.write_text(now)


def mathjax() -> Path:
    """The one file of MathJax that draws formulas without fonts, from the package that carries it."""
    try:
        files = metadata.files("sphinx-mathjax-offline")
        return Path(next(file for file in files if file.name == "tex-svg.js").locate())
    except metadata.PackageNotFoundError:
        raise MissingDependency("sphinx-mathjax-offline", extra="book") from None


def _frame(source: Path) -> str:
    """Hash of what every page depends on besides its own text."""
    files = [source / "_toc.yml", source / "_config.yml", source / "navigation.json", HERE / "extension.py",
             *sorted((HERE / "templates").iterdir())]
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()


def _write_if_new(path: Path, data: bytes) -> bool:
    """Sphinx compares times: a file that says the same keeps its own."""
    if path.exists() and path.read_bytes() == data:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return True


if __name__ == "__main__":
    sys.exit(guarded(main))
