"""What holds for every test: no process is left behind, and no test is skipped in silence."""
from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Iterator

import psutil
import pytest

# The standard library keeps these two helpers alive on purpose; both are direct children of the test process.
KEPT = ("multiprocessing.forkserver", "multiprocessing.resource_tracker")
GRACE_SECONDS = 2.0


def running_children() -> set[psutil.Process]:
    """Every live descendant of this process, less the standard library's two helpers."""
    return {child for child in psutil.Process().children(recursive=True) if not is_kept(child)}


def is_kept(child: psutil.Process) -> bool:
    try:
        if child.status() == psutil.STATUS_ZOMBIE:
            return True
        # A worker forked by the forkserver has the same command line, so the parent decides.
        return child.ppid() == os.getpid() and any(name in " ".join(child.cmdline()) for name in KEPT)
    except psutil.NoSuchProcess:
        return True


def belongs_to(child: psutil.Process, before: set[psutil.Process]) -> bool:
    """Whether what started it was already running: a browser or a Ray of the session starts helpers when it likes."""
    try:
        return any(parent in before for parent in child.parents())
    except psutil.NoSuchProcess:
        return True


def left_behind(before: set[psutil.Process]) -> list[str]:
    """Ends the processes that were started since `before` and outlived the grace period; returns one line for each."""
    deadline = time.monotonic() + GRACE_SECONDS
    while (left := {child for child in running_children() - before if not belongs_to(child, before)}) and (
            time.monotonic() < deadline):
        time.sleep(0.02)
    lines = []
    for child in left:
        try:
            lines.append(f"pid {child.pid}: {' '.join(child.cmdline())[:300]}")
            child.kill()
            child.wait(1)
        except psutil.Error:
            pass
    return lines


@pytest.fixture(autouse=True)
def no_process_left_behind() -> Iterator[None]:
    """Engines that live as long as the session (Spark, Ray) are started by session fixtures, before this one looks."""
    before = running_children()
    yield
    left = left_behind(before)
    if left:
        pytest.fail("left running after the test: " + "; ".join(left), pytrace=False)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        torch = pytest.importorskip("torch")
        if not torch.cuda.is_available():
            pytest.skip("needs a GPU")


def skips(config: pytest.Config) -> list[tuple[str, str, bool]]:
    """(test, reason, may be skipped in CI) of every skipped test, and of every module skipped as a whole."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    found = []
    for report in reporter.stats.get("skipped", []) if reporter else []:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reason = reason.removeprefix("Skipped: ")
        gpu = "gpu" in getattr(report, "keywords", ()) or reason.startswith("needs a GPU")
        found.append((report.nodeid, reason, gpu))
    return found


def not_allowed_in_ci(config: pytest.Config) -> list[tuple[str, str, bool]]:
    return [skip for skip in skips(config) if not skip[2]] if os.environ.get("CI") else []


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    worker = hasattr(session.config, "workerinput")
    passed = session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
    if not worker and passed and not_allowed_in_ci(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    by_reason: dict[str, list[str]] = defaultdict(list)
    for test, reason, _ in skips(config):
        by_reason[reason].append(test)
    terminalreporter.write_line(f"skipped: {sum(map(len, by_reason.values()))}")
    for reason, tests in sorted(by_reason.items()):
        more = f" and {len(tests) - 1} more" if len(tests) > 1 else ""
        terminalreporter.write_line(f"  {len(tests)}  {reason}  ({tests[0]}{more})")
    for test, reason, _ in not_allowed_in_ci(config):
        line = f"FAILED: skipped in CI, though its dependency can be installed: {test}: {reason}"
        terminalreporter.write_line(line, red=True)
