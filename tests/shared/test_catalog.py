"""The table of contents joined with the files: addresses, names, declarations."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

from shared import catalog
from shared.errors import UsageError

CHAPTER_4 = "part1_foundations/ch04_communication_primitives"


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty repository with Chapter 4's folder."""
    monkeypatch.setattr(catalog, "ROOT", tmp_path)
    (tmp_path / CHAPTER_4).mkdir(parents=True)
    return tmp_path / CHAPTER_4


def test_the_whole_book_is_there_in_order() -> None:
    toc = yaml.safe_load((Path(catalog.__file__).parent / "toc.yml").read_text())
    listed = [s["section"] for p in toc["parts"] for c in p["chapters"] for s in c["sections"]]
    assert [section.number for section in catalog.sections()] == listed
    assert (len(catalog.parts()), len({s.chapter.number for s in catalog.sections()}), len(listed)) == (8, 41, 366)


@pytest.mark.parametrize(
    ("address", "first", "count"),
    [
        ("4.4", "4.4", 1),
        ("4.10", "4.10", 1),
        ("4", "4.1", 10),
        ("ch04", "4.1", 10),
        ("ch4", "4.1", 10),
        ("Chapter 4", "4.1", 10),
        ("part1", "1.1", 42),
        (None, "1.1", 366),
    ],
)
def test_addresses(address: str | None, first: str, count: int) -> None:
    found = catalog.find(address)
    assert found[0].number == first
    if address != "part1":
        assert len(found) == count
    else:
        assert {section.chapter.part.number for section in found} == {1}


@pytest.mark.parametrize(
    ("address", "nearest"), [("4.44", "4.4"), ("part9", "part"), ("nonsense", ""), ("", ""), ("40.99", "40.9")]
)
def test_an_unknown_address_is_told_the_nearest(address: str, nearest: str) -> None:
    with pytest.raises(UsageError, match=rf"{address!r}; the nearest is {nearest}\w*"):
        catalog.find(address)


def test_states_follow_the_files(house: Path) -> None:
    def section(number: str) -> catalog.Section:
        return catalog.find(number)[0]

    (house / "s4_10_overlap.py").touch()  # must not count for Section 4.1
    assert section("4.1").state == "planned" and section("4.1").scripts == []
    assert section("4.10").state == "demo only" and section("4.10").demo == house / "s4_10_overlap.py"
    (house / "s4_10_shortcut_torch_ddp.py").touch()
    (house / "s4_10_shortcut_other.py").touch()
    assert section("4.10").state == "ready"
    assert [path.name for path in section("4.10").shortcuts] == [
        "s4_10_shortcut_other.py",
        "s4_10_shortcut_torch_ddp.py",
    ]
    assert section("4.10").demo == house / "s4_10_overlap.py"
    assert catalog.number(house / "s4_10_overlap.py") == "4.10"


def test_nearest_ready_sections_come_by_distance(house: Path) -> None:
    for name in ("s4_02_a.py", "s4_05_a.py", "s4_09_a.py", "s4_10_a.py"):
        (house / name).touch()
    assert catalog.nearest_ready(catalog.find("4.4")[0]) == ["4.5", "4.2", "4.9"]


def test_a_declaration_is_read_without_running_the_script(house: Path) -> None:
    script = house / "s4_04_shortcut_x.py"
    script.write_text('''"""Doc with @demo( inside."""
raise SystemExit("imported")

@demo("4.4", smoke=dict(workers=4, mebibytes=0.25), laptop={"rows": 2**20}, cluster=None,
      needs=("torch", "exe:mpirun"), library="torch (gloo)", handles=("rendezvous",))
def main(run, workers: int = 8) -> None:
    ...
''')
    declared = catalog.declaration(script)
    assert (declared.section, declared.library) == ("4.4", "torch (gloo)")
    assert declared.needs == ("torch", "exe:mpirun") and declared.handles == ("rendezvous",)
    assert declared.presets == {"smoke": {"workers": 4, "mebibytes": 0.25}, "laptop": {"rows": "2 ** 20"}}
    script.write_text("x = 1\n")
    assert catalog.declaration(script).section == ""


def test_load_uses_the_dotted_name_below_the_root_and_the_stem_elsewhere(tmp_path: Path) -> None:
    script = tmp_path / "lonely_script_of_test_catalog.py"
    script.write_text("value = 7\n")
    assert catalog.load(script).value == 7
    assert catalog.module_name(script) == "lonely_script_of_test_catalog"
    assert catalog.module_name(catalog.ROOT / CHAPTER_4 / "x.py") == f"{CHAPTER_4.replace('/', '.')}.x"
    sys.path.remove(str(tmp_path))


def test_what_is_missing_comes_with_its_remedy(house: Path) -> None:
    (catalog.ROOT / "pyproject.toml").write_text(
        '[project]\nname = "scalable-ai"\n[project.optional-dependencies]\n'
        'all = ["scalable-ai[find]"]\nfind = ["no-such-thing[x]>=1", "faiss-nope"]\n'
    )
    assert catalog.extras() == {"find": ["no-such-thing", "faiss-nope"]}
    assert catalog.missing(("json", "exe:sh")) == []
    catalog.DISTRIBUTIONS["no_such_thing"] = "no-such-thing"
    try:
        found = [str(problem) for problem in catalog.missing(("no_such_thing", "exe:no-such-program"))]
    finally:
        del catalog.DISTRIBUTIONS["no_such_thing"]
    assert found == [
        "no_such_thing is not installed: pip install -e '.[find]'",
        "no-such-program is not installed: apt-get install no-such-program",
    ]


def test_every_library_of_the_extras_is_found_under_its_import_name() -> None:
    """A distribution whose import name differs must be in DISTRIBUTIONS, or its scripts could not name the extra."""
    names = {name for extra in catalog.extras().values() for name in extra}
    assert {"scikit-learn", "faiss-cpu", "torch"} <= names
    assert {catalog.DISTRIBUTIONS["sklearn"], catalog.DISTRIBUTIONS["faiss"]} <= names
    assert set(catalog.DISTRIBUTIONS.values()) - names <= {"PyYAML"}


def test_versions_of_what_is_here_and_what_is_not() -> None:
    import yaml as installed

    assert catalog.version("yaml") == installed.__version__
    assert catalog.version("no_such_library") is None
