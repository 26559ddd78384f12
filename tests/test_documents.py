"""README and docs: commands that the command line takes, links that lead somewhere, and a README that stays short."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sqft.cli.parser import parser

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def commands(page: Path) -> list[str]:
    """Return the `sqft` commands of a page's indented blocks, without prompts and comments."""
    text = page.read_text().replace("\\\n", " ")
    found = re.findall(r"^    (?:\$ )?(sqft (?!\.\.\.)[^\n#&…]+)", text, re.MULTILINE)
    return [command.strip() for command in found]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_is_one_that_the_command_line_takes(page):
    for command in commands(page):
        try:
            parser().parse_args(shlex.split(command)[1:])
        except SystemExit:
            pytest.fail(f"{page.name}: {command}")


def test_the_readme_has_commands_and_is_short():
    assert len(commands(ROOT / "README.md")) >= 12
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


@pytest.mark.parametrize("page", PAGES[:2], ids=lambda page: page.name)
def test_links_of_pages_outside_the_site_lead_to_files(page):
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    assert links
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []


@pytest.mark.parametrize(("anchor", "code"), [("there", 0), ("gone", 2)])
def test_make_docs_finds_broken_anchors_and_is_silent_otherwise(tmp_path, anchor, code):
    config = (ROOT / "mkdocs.yml").read_text()
    validation = yaml.safe_load(config[config.index("validation:") : config.index("nav:")])
    (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump({"site_name": "x", "theme": "mkdocs", **validation}))
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text(f"# Start\n\n## There\n\n[link](#{anchor})\n")
    command = ["make", "-s", "-f", str(ROOT / "Makefile"), "docs", "STAMP=", f"BIN={Path(sys.executable).parent}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stdout + done.stderr
    assert ("'#gone'" in done.stdout) == bool(code)
    assert bool(done.stdout) == bool(code)
    shutil.rmtree(tmp_path / "site", ignore_errors=True)
