"""Figures as SVG that takes its ink from the page: drawn from recorded numbers alone, kept until these change."""
from __future__ import annotations

import hashlib
import html
import json
import re
import tempfile
from pathlib import Path
from typing import Any

from shared import catalog, plot
from shared.records import code_hash


def svg(script: Path, result: dict[str, Any], cache: Path) -> str | None:
    """The figure of a recorded result as one <svg> element, or None if the script draws none.

    Text stays text, in the page's own font, and everything grey is drawn in the page's ink.
    """
    source = script.read_text(encoding="utf-8")
    if "\ndef draw(" not in source:
        return None
    style = Path(plot.__file__).read_text(encoding="utf-8") + Path(__file__).read_text(encoding="utf-8")
    drawn_from = [code_hash(source), style, result["records"], result["tables"], result["parameters"]]
    key = hashlib.sha256(json.dumps(drawn_from).encode()).hexdigest()[:16]
    kept = cache / f"{script.stem}.{key}.svg"
    if not kept.exists():
        cache.mkdir(parents=True, exist_ok=True)
        for old in cache.glob(f"{script.stem}.*.svg"):
            old.unlink()
        kept.write_text(_drawn(script, result), encoding="utf-8")
    return kept.read_text(encoding="utf-8")


def _drawn(script: Path, result: dict[str, Any]) -> str:
    import matplotlib

    figure = plot.figure(result, catalog.load(script).draw)
    with tempfile.TemporaryDirectory() as folder, matplotlib.rc_context({"svg.fonttype": "none"}):
        plot.save(figure, Path(folder) / "figure.svg")
        text = (Path(folder) / "figure.svg").read_text(encoding="utf-8")
    element = text[text.index("<svg"):].replace(plot.INK, "currentColor")
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    element = re.sub(r"font-family: [^;\"]+;? ?", "", element)  # the page's own font
    element = re.sub(r'(\bid="|url\(#|xlink:href="#)', rf"\g<1>{script.stem}-", element)  # ids are unique on a page
    title = figure.axes[0].get_title() or script.stem
    label = html.escape(f"Figure: {title}. {_axes(figure)}", quote=True)
    end = element.index(">")
    head = re.sub(r' (width|height)="[^"]*"', "", element[:end])
    element = f'{head} role="img" aria-label="{label}"{element[end:]}'
    return re.sub(r"\n\s*", "\n", element).strip()


def _axes(figure: Any) -> str:
    axes = figure.axes[0]
    labels = [text for text in (axes.get_xlabel(), axes.get_ylabel()) if text]
    return f"Axes: {', '.join(labels)}." if labels else ""
