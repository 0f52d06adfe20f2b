"""What a reader sees and the shell gets: tables, numbers, one-line errors, exit codes. Imports rich and click late."""
from __future__ import annotations

import contextlib
import errno
import math
import os
import signal
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from shared.errors import ReaderError, UsageError, WorkerFailed

if TYPE_CHECKING:
    import click
    from rich.console import Console


def guarded(body: Callable[[], int | None]) -> int:
    """The exit code of `body`: its own, or that of what stopped it, which becomes one line on stderr.

    SIGTERM unwinds the stack and leaves with 143. A reader who closes the pipe gets silence and 141, as from any Unix
    program.
    """
    try:
        with _terminable():
            code = body() or 0
            sys.stdout.flush()
        return code
    except ReaderError as error:
        complain(error)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the interpreter's last flush would fail again, loudly
        if error.errno == errno.EPIPE:
            return 141
        print(f"error: cannot write the output: {error.strerror}", file=sys.stderr)
        return 1


def complain(error: ReaderError) -> None:
    """The one line, and below it, indented, the traceback of a worker that raised."""
    sys.stdout.flush()
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    if isinstance(error, WorkerFailed) and error.worker_traceback:
        print(textwrap.indent(error.worker_traceback.rstrip(), "    "), file=sys.stderr)


def click_main(command: click.Command, argv: Sequence[str] | None, program: str) -> Any:
    """What the command returns (0 after --help). A mistake on the command line is a UsageError, one line."""
    import click

    try:
        return command.main(argv, prog_name=program, standalone_mode=False)
    except click.ClickException as error:
        where = error.ctx.command_path if getattr(error, "ctx", None) else program
        raise UsageError(f"{' '.join(error.format_message().split()).rstrip('.')} (see: {where} --help)") from None


def make_console(quiet: bool = False) -> Console:
    """A rich console on stdout, 100 columns wide in a pipe. Text is text, never markup."""
    from rich.console import Console

    class Output(Console):
        def on_broken_pipe(self) -> None:  # rich would leave with 1, which here means a failed claim
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    return Output(quiet=quiet, markup=False, highlight=False, emoji=False, width=None if sys.stdout.isatty() else 100)


def print_table(console: Console, columns: Sequence[str], rows: Sequence[Sequence[Any]], title: str | None = None,
                note: str | None = None) -> None:
    """A light table with numbers to the right; `rows` hold one value for each column."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True, header_style="bold")
    for i, name in enumerate(columns):
        numeric = all(isinstance(row[i], (int, float)) and not isinstance(row[i], bool) for row in rows)
        table.add_column(Text(str(name)), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(show(value)) for value in row))
    console.print()
    if title:
        console.print(title, style="bold")
    console.print(table)
    if note:
        console.print(note, style="dim")


def show(value: Any) -> str:
    """For people: floats with four significant digits, thousands separated, yes and no, nothing as a dash."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:,.0f}" if 1_000 <= abs(value) < 1e9 and math.isfinite(value) else f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(show, value))}]"
    return str(value)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Inside, SIGTERM raises SystemExit(143) in the main thread, so that everything opened is closed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
