"""The suite's own guards, each seen to fail: a process left behind, and a skip that CI must not accept."""
from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from shared.catalog import ROOT

LEAK = """
import subprocess, sys
from pathlib import Path
def test_leaks():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)  # forgotten"])
    Path("pid").write_text(str(child.pid))
def test_next_is_not_blamed():
    pass
"""
FORKED_LEAK = """
import multiprocessing, time
from pathlib import Path
def test_leaks():
    child = multiprocessing.get_context("forkserver").Process(target=time.sleep, args=(600,), daemon=True)
    child.start()
    Path("pid").write_text(str(child.pid))
def test_next_is_not_blamed():
    pass
"""
CLEAN = """
import multiprocessing, time
def test_forkserver_may_stay():
    child = multiprocessing.get_context("forkserver").Process(target=time.sleep, args=(0.01,))
    child.start()
    child.join()
"""
ENGINE = """
import subprocess, sys
import pytest
STARTS_A_HELPER = '''
import subprocess, sys
sys.stdin.readline()
helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(helper.pid, flush=True)
sys.stdin.readline()
helper.kill()
helper.wait()
'''
@pytest.fixture(scope="session", autouse=True)
def engine():
    with subprocess.Popen([sys.executable, "-c", STARTS_A_HELPER], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          text=True) as process:
        yield process
def test_makes_the_engine_start_a_helper(engine):
    print("now", file=engine.stdin, flush=True)
    assert engine.stdout.readline().strip().isdigit()
"""
SKIPS = """
import pytest
@pytest.mark.skip(reason="needs the extra spark")
def test_one(): pass
"""
GPU_SKIPS = """
import pytest
@pytest.mark.gpu
@pytest.mark.skip(reason="no accelerator here")
def test_marked(): pass
def test_reason(): pytest.skip("needs a GPU with 16 GB")
"""
MODULE_SKIPS = "import pytest\npytest.importorskip('no_such_library_anywhere')\n"


def suite(folder: Path, source: str, ci: bool) -> subprocess.CompletedProcess[str]:
    """Runs a one-file suite under this repository's conftest and settings."""
    shutil.copy(ROOT / "tests/conftest.py", folder)
    (folder / "test_inner.py").write_text(source)
    environment = {name: value for name, value in os.environ.items() if name != "CI" and not name.startswith("PYTEST_")}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", ROOT / "pyproject.toml",
         "--rootdir", folder, folder],
        cwd=folder, env=environment | ({"CI": "true"} if ci else {}), capture_output=True, text=True, timeout=60,
    )


@pytest.mark.parametrize(("source", "command"), [(LEAK, "# forgotten"), (FORKED_LEAK, "forkserver")])
def test_a_process_left_behind_fails_the_test_and_is_ended(tmp_path: Path, source: str, command: str) -> None:
    run = suite(tmp_path, source, ci=False)
    pid = (tmp_path / "pid").read_text()
    assert run.returncode == 1 and "2 passed, 1 error" in run.stdout, run.stdout
    assert f"left running after the test: pid {pid}: " in run.stdout and command in run.stdout
    assert not psutil.pid_exists(int(pid))


def test_the_helper_of_an_engine_of_the_session_may_stay(tmp_path: Path) -> None:
    run = suite(tmp_path, ENGINE, ci=False)
    assert run.returncode == 0 and "1 passed" in run.stdout, run.stdout


def test_the_forkserver_may_stay(tmp_path: Path) -> None:
    run = suite(tmp_path, CLEAN, ci=False)
    assert run.returncode == 0, run.stdout


@pytest.mark.parametrize("source", [SKIPS, "def test_ran(): pass\n" + MODULE_SKIPS], ids=["test", "module"])
def test_ci_refuses_a_skip(tmp_path: Path, source: str) -> None:
    run = suite(tmp_path, source, ci=True)
    assert run.returncode == 1 and "skipped: 1\n" in run.stdout, run.stdout
    assert "FAILED: skipped in CI, though its dependency can be installed: " in run.stdout


def test_a_reader_may_skip_and_sees_why(tmp_path: Path) -> None:
    run = suite(tmp_path, SKIPS, ci=False)
    assert run.returncode == 0, run.stdout
    assert "skipped: 1\n  1  needs the extra spark  (test_inner.py::test_one)\n" in run.stdout


def test_ci_accepts_a_missing_gpu(tmp_path: Path) -> None:
    run = suite(tmp_path, GPU_SKIPS, ci=True)
    assert run.returncode == 0 and "skipped: 2\n" in run.stdout, run.stdout
