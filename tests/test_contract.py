"""The contract that every script of the book meets, over all that are found: nothing here knows a section by name."""
from __future__ import annotations

import ast
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import psutil
import pytest

from shared import catalog, engines

SCRIPTS = [script for section in catalog.sections() for script in section.scripts]
SCHEMA = json.loads((catalog.ROOT / "shared" / "result.schema.json").read_text())
HEAVY = ("torch", "sklearn", "scipy", "pyspark", "ray", "vllm", "deepspeed", "faiss", "transformers", "flwr",
         "gymnasium", "mpi4py")
STARTS_AN_ENGINE = {"pyspark", "ray", "vllm", "deepspeed"}
LINES = ("Question", "Method", "Read", "Source")

every_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)


def cli(script: Path, *arguments: str) -> int:
    """The exit code of the script's command line, run in this process so that torch is imported once for all."""
    with pytest.raises(SystemExit) as ended:
        catalog.load(script).main.cli(list(arguments), script.name)
    return ended.value.code or 0


def shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm")) if Path("/dev/shm").is_dir() else set()


@every_script
@pytest.mark.timing
def test_smoke_run(script: Path, tmp_path: Path, monkeypatch, capfd) -> None:
    """Every claim holds, the JSON is valid, the figure is drawn, stderr is silent, and nothing else is left."""
    monkeypatch.chdir(tmp_path)
    before = shared_memory()
    draws = "def draw(" in script.read_text()
    try:
        code = cli(script, "--preset", "smoke", "--json", "result.json", *(["--plot", "figure.png"] if draws else []))
    finally:
        engines.stop()  # Spark and Ray live as long as the process that started them, which here is pytest
    printed = capfd.readouterr()
    assert code == 0, printed.out + printed.err
    result = json.loads((tmp_path / "result.json").read_text())
    jsonschema.validate(result, SCHEMA)
    assert result["ok"] and result["claims"] and all(claim["holds"] for claim in result["claims"])
    assert any(table["rows"] for table in result["tables"]), "it prints no table"
    assert all(claim["text"] in " ".join(printed.out.split()) for claim in result["claims"])
    assert result["section"] == catalog.number(script)
    limit = 15 if STARTS_AN_ENGINE & set(catalog.declaration(script).needs) else 3
    assert result["seconds"] < 4 * limit, f"smoke took {result['seconds']:.1f} s, on a quiet machine {limit} s at most"
    assert not printed.err, "a run without trouble says nothing on stderr"
    assert {path.name for path in tmp_path.iterdir()} == {"result.json"} | ({"figure.png"} if draws else set())
    assert shared_memory() <= before, "left in shared memory"
    if draws:
        assert (tmp_path / "figure.png").stat().st_size > 5000


@every_script
def test_it_compares_equal_work(script: Path) -> None:
    """A shortcut times both sides, counts lines, says what the library handles, and claims agreement with its twin."""
    declared = catalog.declaration(script)
    assert {"smoke", "laptop"} <= declared.presets.keys()
    if "_shortcut_" not in script.name:
        assert declared.library is None
        return
    source = script.read_text()
    assert declared.library and declared.handles and "run.compare(" in source and "run.lines_of_code(" in source
    twin = next(section.demo for section in catalog.sections() if script in section.shortcuts)
    assert twin is not None, "a shortcut needs its twin"
    imported = {node.module for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)}
    chapter = ".".join(script.parent.relative_to(catalog.ROOT).parts)
    assert any(name and name.startswith(chapter) for name in imported), "it imports nothing of its twin's"


@every_script
def test_names_and_docstring(script: Path) -> None:
    docstring = ast.get_docstring(ast.parse(script.read_text())) or ""
    assert docstring.startswith(f"Section {catalog.number(script)}"), "the docstring's first line names the section"
    for word in LINES:
        assert re.search(rf"^{word} +\S", docstring, re.MULTILINE), f"the docstring lacks its line {word}"
    assert catalog.declaration(script).section == catalog.number(script)
    tests = "\n".join(path.read_text() for path in (catalog.ROOT / "tests").rglob("test_ch*.py"))
    assert script.stem in tests, "no test names it"


def test_every_demo_has_a_shortcut_and_the_reverse() -> None:
    assert [s.number for s in catalog.sections() if bool(s.demo) != bool(s.shortcuts)] == []


def test_every_script_belongs_to_a_section() -> None:
    found = {path for part in catalog.parts() for path in part.folder.glob("ch*/s[0-9]*_*.py")}
    assert found == set(SCRIPTS), "a script whose name is not that of a section of the table of contents"
    assert len(SCRIPTS) >= 20


@every_script
def test_import_is_quick_and_free_of_side_effects(script: Path, tmp_path: Path) -> None:
    probe = (f"import sys, time, threading, numpy, typer; begin = time.process_time();"
             f"import {catalog.module_name(script)}; own = time.process_time() - begin;"
             f"print(own, threading.active_count(), [n for n in {HEAVY!r} if n in sys.modules])")
    done = subprocess.run([sys.executable, "-c", probe], cwd=tmp_path, capture_output=True, text=True, check=True)
    seconds, threads, heavy = done.stdout.split(" ", 2)
    assert heavy.strip() == "[]", f"imports {heavy.strip()} at the top: import optional libraries inside functions"
    assert threads == "1" and not done.stderr and not list(tmp_path.iterdir())
    assert float(seconds) < 1.0, f"importing it takes {float(seconds):.2f} s beyond NumPy and typer"


@every_script
def test_mistakes_get_one_line(script: Path, tmp_path: Path, monkeypatch, capfd) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli(script, "--help") == 0
    helped = capfd.readouterr().out
    assert "--preset" in helped
    mistakes = [["--no-such-option"], ["--preset", "enormous"], ["--json", "no/such/folder/x.json"], ["--seed", "x"]]
    for option, values in (("--workers", ("0", "-1", "9999")), ("--mebibytes", ("0", "-1"))):
        mistakes += [["--preset", "smoke", option, bad] for bad in values if f"{option} " in helped]
    for arguments in mistakes:
        code, printed = cli(script, *arguments), capfd.readouterr()
        assert code == 2 and printed.err.startswith("error: ") and printed.err.count("\n") == 1, (arguments, printed)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", [path for path in SCRIPTS if catalog.declaration(path).needs],
                         ids=lambda path: path.stem)
def test_a_missing_library_is_named(script: Path, tmp_path: Path) -> None:
    """By its path from another directory, with what it needs hidden: one line with the remedy, exit code 3."""
    needs = [need for need in catalog.declaration(script).needs if not need.startswith("exe:")]
    (tmp_path / "sitecustomize.py").write_text(
        "from importlib.machinery import PathFinder\nfind = PathFinder.find_spec\n"
        "PathFinder.find_spec = classmethod(lambda cls, name, path=None, target=None:"
        f" None if name.split('.')[0] in {needs!r} else find(name, path, target))\n")
    done = subprocess.run([sys.executable, script, "--preset", "smoke"], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 3, done
    assert len(done.stderr.splitlines()) == 1 and "not installed" in done.stderr and "pip install" in done.stderr


@every_script
def test_interrupted_in_the_middle(script: Path, tmp_path: Path) -> None:
    """Ctrl-C once its workers are at it: exit code 130, one line, no file, no process."""
    process = psutil.Popen([sys.executable, script, "--preset", "laptop", "--json", "result.json"], cwd=tmp_path,
                           stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        deadline = time.monotonic() + 30
        while process.poll() is None and len(process.children(recursive=True)) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert process.poll() is None, f"it ended before it could be interrupted: {process.stderr.read()}"
        started = process.children(recursive=True)
        time.sleep(0.2)
        os.killpg(process.pid, signal.SIGINT)  # the whole foreground group, as a terminal does
        _, errors = process.communicate(timeout=10)
    finally:
        if process.poll() is None:
            process.kill()
    assert process.returncode == 130 and errors == "interrupted\n", errors
    _, alive = psutil.wait_procs(started, timeout=2)
    assert not alive, f"left running: {[child.cmdline() for child in alive]}"
    assert not list(tmp_path.iterdir())
