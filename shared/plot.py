"""The one matplotlib style: transparent, restrained, readable on light and dark pages and by colour-blind readers."""
from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.errors import UsageError
from shared.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")
INK = "#7d7d7d"  # a grey with a contrast of about 4:1 on white and on near-black alike
# Okabe & Ito's palette without black and yellow, which vanish on one of the two backgrounds.
CYCLE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


def style() -> dict[str, Any]:
    """The rcParams, to be used as `with matplotlib.rc_context(style())`."""
    from cycler import cycler

    ink = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "axes.titlecolor",
           "legend.labelcolor")
    return dict.fromkeys(ink, INK) | {
        "axes.prop_cycle": cycler(color=CYCLE), "axes.spines.top": False, "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.grid": True, "grid.color": INK, "grid.alpha": 0.25, "grid.linewidth": 0.6, "axes.titlesize": "medium",
        "axes.facecolor": "none", "figure.facecolor": "none", "savefig.facecolor": "none", "legend.frameon": False,
        "lines.linewidth": 1.8, "lines.markersize": 5, "font.size": 10, "figure.figsize": (6.4, 3.8), "figure.dpi": 100,
        "savefig.dpi": 160, "svg.hashsalt": "scalable", "figure.constrained_layout.use": True,
    }


def figure(result: dict[str, Any], draw: Callable[[dict[str, Any], Axes], None]) -> Figure:
    """One figure of one axes, drawn by `draw` from the recorded numbers alone. No pyplot, so no window and no state."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(style()):
        drawing = Figure()
        FigureCanvasAgg(drawing)
        draw(result, drawing.add_subplot())
    return drawing


def save(drawing: Figure, path: str | Path) -> None:
    """Write the figure as .png, .svg or .pdf: whole or not at all, and the same bytes for the same numbers."""
    import matplotlib

    suffix = check_format(path)
    metadata = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(suffix)
    buffer = io.BytesIO()
    with matplotlib.rc_context(style()):
        drawing.savefig(buffer, format=suffix[1:], metadata=metadata)
    write_atomically(path, buffer.getvalue())


def check_format(path: str | Path) -> str:
    """The suffix of `path`; UsageError unless it is one of FORMATS."""
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise UsageError(f"cannot draw {path}: the file name must end in {', '.join(FORMATS)}")
    return suffix
