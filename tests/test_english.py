"""House rules that a program can check: the first word of docstrings, and the length of files."""
import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("layers", "hnet", "experiments", "configs", "tests")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
OPENERS = re.compile(r"(What|Of|How|Where|As|Such|That)\b")  # they leave the subject to the reader
MAX_LINES = 300


def bad_openings(source: str) -> list[str]:
    """Lists as "line: first line" the docstrings of a source text that begin with one of OPENERS."""
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, documented)]
    texts = [(getattr(node, "lineno", 1), ast.get_docstring(node) or "") for node in nodes]
    return [f"{line}: {text.splitlines()[0]}" for line, text in texts if OPENERS.match(text)]


def test_bad_openings_are_found():
    source = '"""What a module holds."""\ndef f():\n    """As is."""\nclass A:\n    """Often fine."""\n'
    assert bad_openings(source) == ["1: What a module holds.", "2: As is."]


def test_no_docstring_begins_without_its_subject():
    found = [f"{path.relative_to(ROOT)}:{opening}" for path in FILES
             for opening in bad_openings(path.read_text(encoding="utf-8"))]
    assert not found, "\n".join(found)


def test_files_outside_kernels_have_at_most_300_lines():
    lengths = {path.relative_to(ROOT): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    too_long = [f"{path}: {length}" for path, length in lengths.items()
                if length > MAX_LINES and path.parts[0] != "tests" and "pallas" not in path.name]
    assert not too_long, "\n".join(too_long)
