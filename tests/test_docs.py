"""README and docs/ say what is there: commands parse, recipes build, links and named files exist, nothing is stale."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from pipeline.recipe.recipe import read

PAGES = sorted([*ROOT.glob("README*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "recipes" / "README.md"])
of_each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
FOLDERS = ("tests/", "scripts/", "recipes/", "pipeline/", "data/", "docs/", ".ci/")
ENDINGS = (".py", ".md", ".yaml", ".json", ".jsonl", ".sh", ".svg", ".txt", ".jinja")


def blocks(page: Path, *languages: str) -> list[str]:
    return [text for language, text in FENCE.findall(page.read_text(encoding="utf-8")) if language in languages]


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def spans(page: Path) -> list[str]:
    """What stands in backquotes in running text; a line end within it is a space."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(page))]


def command_lines(page: Path) -> Iterator[list[str]]:
    for line in "\n".join(blocks(page, "")).splitlines():
        if line.startswith("onebase "):
            yield shlex.split(line, comments=True)[1:]
    for span in spans(page):
        if span.startswith("onebase "):
            yield shlex.split(span)[1:]


@of_each_page
def test_every_command_line_parses(page: Path) -> None:
    from typer.main import get_command

    from pipeline.cli import app

    group = get_command(app)
    top = group.make_context("onebase", ["ls"])
    for name, *given in command_lines(page):
        if name == "COMMAND":
            continue
        command = group.get_command(top, name)  # type: ignore[attr-defined]
        assert command, f"there is no command `onebase {name}`"
        if given:  # without, running text names the command and does not type it
            try:
                command.make_context(name, given, parent=top)
            except Exception as error:
                pytest.fail(f"`{shlex.join(['onebase', name, *given])}`: {error}")


@of_each_page
def test_every_recipe_builds(page: Path, tmp_path: Path) -> None:
    for text in blocks(page, "yaml"):
        tree = yaml.safe_load(text)
        if isinstance(tree, dict) and "stages" in tree:
            (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
            assert read(tmp_path / "recipe.yaml").order()


@of_each_page
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?://", link):
            continue
        file, _, heading = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), f"{link}: no such file"
        assert not heading or heading in headings(target), f"{link}: no such heading"


def headings(page: Path) -> list[str]:
    """The anchors that GitHub gives them."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]


@of_each_page
def test_every_named_file_is_there(page: Path) -> None:
    for span in [*spans(page), *"\n".join(blocks(page, "")).splitlines()]:
        for word in re.findall(r"[\w./-]+", span):
            file = word.split("::")[0].rstrip(".")
            if file.startswith(FOLDERS) and (file.endswith(ENDINGS) or file.endswith("/")):
                assert (ROOT / file).exists() or (ROOT / "pipeline" / file).exists(), f"{file} is not there"
            elif file.endswith(".py") and "/" in file:
                assert (ROOT / "pipeline" / file).exists() or (ROOT / file).exists(), f"{file} is not there"


def test_every_page_of_the_docs_is_named_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    unnamed = [page.name for page in (ROOT / "docs").glob("*.md") if f"(docs/{page.name})" not in readme]
    chinese = (ROOT / "README.zh-CN.md").read_text(encoding="utf-8")
    unnamed += [page.name for page in (ROOT / "docs" / "zh").glob("*.md") if f"(docs/zh/{page.name})" not in chinese]
    assert not unnamed


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "zh").glob("*.md")), ids=lambda page: page.name)
def test_a_chinese_page_shows_the_same_commands_and_recipes(page: Path) -> None:
    english = ROOT / "docs" / page.name
    assert list(command_lines(page)) == list(command_lines(english))
    here, there = ([yaml.safe_load(text) for text in blocks(one, "yaml")] for one in (page, english))
    assert here == there


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md"])
def test_the_readme_is_short(name: str) -> None:
    if (ROOT / name).exists():
        assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= 150


@of_each_page
def test_no_page_is_long(page: Path) -> None:
    assert len(page.read_text(encoding="utf-8").splitlines()) <= 250


def test_the_reference_is_what_the_code_says() -> None:
    """If not: python scripts/make_reference.py"""
    shown = subprocess.run([sys.executable, "scripts/make_reference.py", "--check"], cwd=ROOT)
    assert shown.returncode == 0


def test_every_page_is_in_the_navigation_of_the_site() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    pages = [page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")]
    assert not [page for page in pages if f": {page}\n" not in navigation]


def test_the_site_builds_and_needs_no_network(tmp_path: Path) -> None:
    """Strictly: a link or a heading that the site lacks is an error."""
    for package in ("mkdocs", "material"):
        pytest.importorskip(package, reason="pip install -e '.[docs]'")
    build = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path)]
    assert subprocess.run(build, cwd=ROOT).returncode == 0
    for page in tmp_path.rglob("*.html"):
        loaded = re.findall(
            r"<(?:script|link|img)\b[^>]*\b(?:src|href)=\"(https?:[^\"]*)", page.read_text(encoding="utf-8")
        )
        assert not loaded, f"{page.name} loads {loaded[0]}"
