"""Checks of the documentation: its snippets run as printed, and its links, commands and config names exist."""
import ast
import re
import sys
import types
from pathlib import Path
from typing import NamedTuple

import pytest

from experiments.config import RunConfig
from experiments.config.files import load_config
from experiments.tasks.config import TaskConfig

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLE_LINES = 40  # the worked examples of CONTRIBUTING.md are shorter
README_LINES = 80
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Snippet(NamedTuple):
    language: str
    line: int  # of its first line in the page
    text: str


def snippets(page: Path) -> list[Snippet]:
    text = page.read_text(encoding="utf-8")
    return [Snippet(found[1], text[:found.start(2)].count("\n") + 1, found[2]) for found in FENCED.finditer(text)]


def commands(page: Path) -> list[str]:
    """Lists the command lines in blocks without a language, and in `code` within the text."""
    text = page.read_text(encoding="utf-8")
    shell = [line for snippet in snippets(page) if not snippet.language for line in snippet.text.splitlines()]
    return shell + re.findall(r"`([^`\n]+)`", FENCED.sub("", text))


def by_name(pages: list[Path]):
    return pytest.mark.parametrize("page", pages, ids=[page.name for page in pages])


@by_name([page for page in PAGES if any(snippet.language == "python" for snippet in snippets(page))])
def test_python_snippets_run_as_printed(page, tmp_path, monkeypatch):
    """Runs the snippets of a page one after the other in one namespace, in an empty directory."""
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("snippets")  # dataclasses and flax look up the module of a class by name
    monkeypatch.setitem(sys.modules, "snippets", module)
    for snippet in snippets(page):
        if snippet.language == "python":
            source = "\n" * (snippet.line - 1) + snippet.text
            exec(compile(source, str(page), "exec"), module.__dict__)


@by_name(PAGES)
def test_relative_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, heading = target.partition("#")
        if target.startswith(("http:", "https:")):
            continue
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}, which is not there"
        if heading:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings]
            assert heading in slugs, f"{page.name} links to {target}, a heading that is not there"


@by_name(PAGES)
def test_named_modules_configs_and_make_targets_exist(page):
    names = {path.stem for path in (ROOT / "configs").rglob("*.py")}
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for line in commands(page):
        for module in re.findall(r"python -m ((?:experiments|tests)[\w.]*)", line):
            path = ROOT / module.replace(".", "/")
            assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), f"{module} is not there"
        for value in re.findall(r"--configs?=([\w,]+)", line):
            unknown = set(value.split(",")) - names - {"NAME"}
            assert not unknown, f"{page.name} names configs that are not there: {unknown}"
        for target in re.findall(r"^make ([\w-]+)", line):
            assert target in targets, f"{page.name}: make {target} is not there"


@by_name(PAGES)
def test_fields_set_in_commands_exist(page):
    """Loads the config that a command names, or else the quick start's, with the fields that it sets."""
    for line in commands(page):
        overrides = re.findall(r"--config\.[\w.]+=(?:'[^']*'|\S+)", line)
        name = re.search(r"--config=(\w+)", line)
        kind = TaskConfig if "experiments.tasks" in line else RunConfig
        if overrides:
            load_config(name[1] if name else "quickstart", [each.replace("'", "") for each in overrides], kind)


def test_the_readme_is_one_screen():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= README_LINES


def test_worked_examples_are_short_and_stand_alone():
    examples = [s for s in snippets(ROOT / "CONTRIBUTING.md") if s.language == "python"]
    assert len(examples) >= 4
    for example in examples:
        assert example.text.count("\n") < EXAMPLE_LINES, f"CONTRIBUTING.md:{example.line} is longer"


CONFIGS = [path for path in sorted((ROOT / "configs").rglob("*.py")) if not path.name.startswith("_")]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_ends_its_docstring_with_its_command_hardware_and_result(path):
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert f"--config={path.stem} " in text, f"{path.name} does not say how to run it"
    end = text.split("\n\n")[-1]
    is_known = re.match(r"Measured: .*(CPU|GPU|TPU)|Not (trained|measured) here", end)
    assert is_known, f"{path.name} ends with {end!r}"
