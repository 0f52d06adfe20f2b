"""Figures come from recorded numbers alone, reproducibly, and readable on any page."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from shared import plot
from shared.errors import ReaderError, UsageError

RESULT = {"records": {"size": [1, 2, 4], "seconds": [0.1, None, 0.4]}}


def draw(result: dict, axes) -> None:
    axes.plot(result["records"]["size"], result["records"]["seconds"], marker="o", label="ring")
    axes.set(xlabel="MiB", ylabel="s", title="one all-reduce")
    axes.legend()


def relative_luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("page", ["#ffffff", "#121212"])
def test_text_has_contrast_on_light_and_dark_pages(page: str) -> None:
    light, dark = sorted((relative_luminance(plot.INK) + 0.05, relative_luminance(page) + 0.05), reverse=True)
    assert light / dark >= 4


@pytest.mark.parametrize(("suffix", "magic"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_formats_and_reproducible_bytes(tmp_path: Path, suffix: str, magic: bytes) -> None:
    for name in ("a", "b"):
        plot.save(plot.figure(RESULT, draw), tmp_path / f"{name}{suffix}")
    first, second = ((tmp_path / f"{name}{suffix}").read_bytes() for name in ("a", "b"))
    assert first.startswith(magic) and first == second
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"a{suffix}", f"b{suffix}"]


def test_the_background_is_transparent_and_the_data_are_drawn() -> None:
    import numpy as np

    drawing = plot.figure(RESULT, draw)
    drawing.canvas.draw()
    pixels = np.asarray(drawing.canvas.buffer_rgba())
    assert pixels[0, 0, 3] == 0 and (pixels[..., 3] > 0).any()
    [line] = drawing.axes[0].lines
    assert line.get_color() == plot.CYCLE[0] and list(line.get_xdata()) == [1, 2, 4]


def test_an_unknown_format_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="must end in .png, .svg, .pdf"):
        plot.save(plot.figure(RESULT, draw), tmp_path / "a.gif")
    assert not list(tmp_path.iterdir())


def test_a_failing_write_names_the_file_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ReaderError, match=r"cannot write .*gone.a\.png: No such file"):
        plot.save(plot.figure(RESULT, draw), tmp_path / "gone" / "a.png")


def test_the_style_stays_inside_the_figure_and_needs_no_pyplot(tmp_path: Path) -> None:
    code = (
        "import sys; from shared import plot; assert 'matplotlib' not in sys.modules;"
        "import matplotlib; before = {name: matplotlib.rcParams[name] for name in plot.style()};"
        "plot.save(plot.figure({}, lambda r, axes: axes.plot([1])), sys.argv[1]);"
        "assert before == {name: matplotlib.rcParams[name] for name in before};"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.png")], check=True, timeout=60)
