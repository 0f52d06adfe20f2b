"""The Sphinx extension of this book: the sidebar with built and planned sections, and the folder of templates.

jupyter-book finds it because build.py puts the repository on PYTHONPATH.
"""
from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx


def sidebar(tree: dict[str, Any], here: str, link) -> str:
    """Parts; below the current one its chapters; below the current chapter its sections, planned ones marked.

    `here` is the current document, `link` turns a document into an address seen from it.
    """
    def line(title: str, page: str | None, below: str = "") -> str:
        title = html.escape(title)
        if page is None:
            return f'<li><span class="planned-entry">{title} <span class="planned">planned</span></span>{below}</li>'
        current = ' aria-current="page"' if page == here else ""
        return f'<li><a href="{html.escape(link(page))}"{current}>{title}</a>{below}</li>'

    def nested(lines: list[str]) -> str:
        return f"<ul>{''.join(lines)}</ul>" if lines else ""

    def chapter_line(chapter: dict[str, Any]) -> str:
        pages = [chapter["page"], *(item["page"] for item in (*chapter["sections"], *chapter["modules"]))]
        below = ""
        if here in pages:
            below = nested([line(f"{s['number']} {s['title']}", s["page"]) for s in chapter["sections"]]
                           + [line(m["title"], m["page"]) for m in chapter["modules"]])
        return line(f"{chapter['number']} {chapter['title']}", chapter["page"], below)

    lines = []
    for part in tree["parts"]:
        inside = {part["page"]} | {item["page"] for chapter in part["chapters"]
                                   for item in (chapter, *chapter["sections"], *chapter["modules"])}
        below = nested([chapter_line(chapter) for chapter in part["chapters"]]) if here in inside else ""
        lines.append(line(f"{part['number']}. {part['title']}", part["page"], below))
    across = [line(item["title"], item["page"], nested([line(b["title"], b["page"]) for b in item["below"]])
                   if here in (item["page"], *(b["page"] for b in item["below"])) else "") for item in tree["across"]]
    return f'<ul class="parts">{"".join(lines)}</ul><p class="heading">Across the book</p><ul>{"".join(across)}</ul>'


def add_sidebar(app: Sphinx, pagename: str, templatename: str, context: dict[str, Any], doctree: Any) -> None:
    tree = app.book_navigation
    context["book_sidebar"] = sidebar(tree, pagename, context["pathto"])


def read_navigation(app: Sphinx) -> None:
    app.book_navigation = json.loads((Path(app.srcdir) / "navigation.json").read_text(encoding="utf-8"))


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_config_value("comments_config", {}, "env")  # jupyter-book asks for it also without sphinx-comments
    app.config.templates_path.append(str(Path(__file__).parent / "templates"))
    app.connect("builder-inited", read_navigation)
    app.connect("html-page-context", add_sidebar)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
