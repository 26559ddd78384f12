"""The picture of the rooms is drawn from the code and from CONTRIBUTING's table, and refuses what contradicts them."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def structure():
    spec = importlib.util.spec_from_file_location("structure", ROOT / "docs" / "structure.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_committed_picture_is_that_of_the_code(structure):
    assert structure.FIGURE.read_text() == structure.draw(), "src/sqft has other imports now: make picture"


def test_it_has_imports_that_are_there_and_no_others(structure):
    rows = structure.rooms()
    found = {(rows[a].names[0], rows[b].names[0]) for a, b in structure.imports(rows)}
    assert ("adapters/", "core/") in found
    assert ("core/", "adapters/") not in found
    assert not {one for one, _ in found} & {"errors.py"}


def test_an_import_that_points_up_is_an_error(structure):
    with pytest.raises(ValueError, match=r"sqft\S* imports sqft\.\S+, which stands above it"):
        structure.imports(structure.rooms()[::-1])


def test_a_module_without_a_room_and_a_room_without_a_module_are_errors(structure):
    rows = structure.rooms()
    with pytest.raises(ValueError, match=r"not in src/sqft: \[\]; or lacks: \['data/'\]"):
        structure.imports([room for room in rows if room.names != ("data/",)])
    with pytest.raises(ValueError, match=r"not in src/sqft: \['cellar/'\]"):
        structure.imports([*rows, structure.Room(("cellar/",), "wine")])


def test_lines_are_counted(structure):
    room = structure.Room(("progress.py", "evaluation/"), "")
    files = [ROOT / "src/sqft/progress.py", *(ROOT / "src/sqft/evaluation").glob("*.py")]
    assert structure.lines_of(room) == sum(file.read_text().count("\n") for file in files)
    core = next(room for room in structure.rooms() if room.names == ("core/",))
    assert f"| `core/` | {core.what} | " in structure.table()
