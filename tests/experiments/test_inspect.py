"""Looking inside a model: what is refused, what the terminal shows, and a page that needs nothing beside it."""
import contextlib
import re
from types import SimpleNamespace

import pytest

from experiments import inspect
from experiments.analysis.perturbations import perturb
from experiments.data import ByteTokenizer
from tests.experiments.pages.test_report import HOSTILE, Page
from tests.support.models import random_params
from tests.support.runs import config_of, refusal

TEXT = b"import x2\nthe chunk of\tgr\xc3\xbcn " + HOSTILE


@pytest.fixture(scope="module")
def run_of(configs, tmp_path_factory):
    """A function of a config's name: that model with random weights, in a workdir of its own."""
    def make(name: str) -> SimpleNamespace:
        config = config_of(configs / f"{name}.py")
        return SimpleNamespace(workdir=tmp_path_factory.mktemp(f"{name}<i>"), config=config, step=3,
                               params=lambda: random_params(config.model), tokenizer=ByteTokenizer)

    return make


@pytest.fixture(scope="module")
def two_stages(run_of):
    """(run, what there is to see in it)"""
    run = run_of("two_stage")
    return run, inspect.inspect_text(run, "a <text>", TEXT)


def _refusal(*arguments) -> str:
    return refusal(inspect.main, [str(argument) for argument in arguments])


@pytest.mark.parametrize(("arguments", "message"), [
    ([], "neither of --text=TEXT and --file=PATH given; give one"),
    (["--text=a", "--file={tmp}/text"], "both of --text=TEXT and --file=PATH given; give one"),
    (["--text="], "--text is empty; a text of at least one byte is needed"),
    (["--file={tmp}/empty"], "--file={tmp}/empty is empty; a text of at least one byte is needed"),
    (["--file={tmp}/none"], "--file={tmp}/none: cannot be read (No such file or directory)"),
    (["--file={tmp}"], "--file={tmp}: cannot be read (Is a directory)"),
    (["--text=a", "--show=-1"], "--show -1 must not be negative"),
    (["--text=a"], "no run has saved a checkpoint there"),
])
def test_what_does_not_fit_is_refused(arguments, message, tmp_path):
    (tmp_path / "empty").touch()
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    assert message.format(tmp=tmp_path) in _refusal(f"--workdir={tmp_path}", *arguments)


def test_a_page_that_cannot_be_written_is_refused_with_the_reason(two_stages, tmp_path, monkeypatch):
    _show(two_stages, monkeypatch)
    text = _refusal("--workdir=w", "--text=a", f"--html={tmp_path}")
    assert text == f"--html={tmp_path}: cannot write there (Is a directory); name another file"


def _show(run_and_inspection, monkeypatch) -> None:
    """Lets the command show this, without a checkpoint and without a model."""
    run, inspection = run_and_inspection
    monkeypatch.setattr(inspect.SavedRun, "from_command_line", lambda parser, argv: contextlib.nullcontext(run))
    monkeypatch.setattr(inspect, "inspect_text", lambda *_: inspection)


def test_a_text_from_the_command_line_and_from_a_file_give_the_same(finished_run, tmp_path, capsys):
    """On a command line, Python stands bytes that are not UTF-8 in for by lone surrogates."""
    text = b"the chunk = gr\xc3\xbcn \xff\n"
    (tmp_path / "text").write_bytes(text)
    inspect.main([f"--workdir={finished_run}", f"--html={tmp_path}/page.html", "--text=" + text.decode(
        "utf-8", "surrogateescape")])
    first = capsys.readouterr().out
    inspect.main([f"--workdir={finished_run}", f"--html={tmp_path}/page.html", f"--file={tmp_path}/text"])
    second = capsys.readouterr().out
    bits = re.match(r"step 20, text: 20 bytes, (\d\.\d{3}) bits per byte\n", first)[1]
    assert re.search(rf"^none +20 +{bits} ", first, re.M)
    assert first == second and first.endswith(f"page: {tmp_path}/page.html\n")
    assert "\x1b" not in first
    assert not (finished_run / "inspect.html").exists()


def test_the_terminal_shows_every_stage_and_every_table(two_stages, monkeypatch, capsys):
    _show(two_stages, monkeypatch)
    inspect.main(["--workdir=w", "--text=a", "--show=20"])
    shown = capsys.readouterr().out
    run, inspection = two_stages
    assert shown.count(f"; the first 20 of {len(TEXT):,} bytes, each | is a boundary") == 2
    for table in (inspection.stages, *inspection.places, inspection.effects):
        for row in table.rows:
            assert re.search(r" +".join(map(re.escape, filter(None, row))), shown), row
    assert [row[0] for row in inspection.effects.rows] == [name for name, _ in perturb(TEXT)]
    assert [table.header[0] for table in inspection.places] == ["stage0", "stage1"]
    assert shown.endswith(f"page: {run.workdir / 'inspect.html'}\n")


@pytest.mark.parametrize(("is_terminal", "no_color", "is_coloured"), [
    (True, "", True), (True, "1", False), (False, "", False)])
def test_colours_are_for_terminals_that_want_them(
        two_stages, is_terminal, no_color, is_coloured, monkeypatch, capsys):
    _show(two_stages, monkeypatch)
    monkeypatch.setattr("sys.stdout.isatty", lambda: is_terminal)
    monkeypatch.setenv("NO_COLOR", no_color)
    inspect.main(["--workdir=w", "--text=a"])
    shown = capsys.readouterr().out
    assert ("\x1b[" in shown) == is_coloured == ("each change of colour" in shown)


def test_the_page_has_every_byte_once_per_stage_and_loads_nothing(two_stages, monkeypatch):
    run, _ = two_stages
    _show(two_stages, monkeypatch)
    inspect.main(["--workdir=w", "--text=a", "--show=1"])
    text = (run.workdir / "inspect.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.bytes_of_pre == [TEXT, TEXT]
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "img", "iframe", "object"} and {"svg", "table", "input"} <= tags
    assert not page.attributes("src") and not page.attributes("href") and "url(" not in text
    assert "default-src 'none'" in text and "a &lt;text&gt;" in text


def test_a_model_without_stages_still_has_bits_and_changes(run_of, monkeypatch, capsys):
    run = run_of("isotropic")
    inspection = inspect.inspect_text(run, "t", TEXT)
    assert inspection.places == () and inspection.effects.header == ("", "bytes", "bits\nper byte")
    _show((run, inspection), monkeypatch)
    inspect.main(["--workdir=w", "--text=a"])
    shown, page = capsys.readouterr().out, (run.workdir / "inspect.html").read_text(encoding="utf-8")
    for output in (shown, page):
        assert "This model has no stages that chunk" in output and "no whitespace" in output
        assert "F1" not in output and "boundaries" not in output
    assert Page(page).bytes_of_pre == [TEXT]


def test_only_the_beginning_of_a_long_text_is_changed_and_the_reader_is_told(run_of, monkeypatch):
    monkeypatch.setattr(inspect, "PERTURBED_BYTES", 40)
    inspection = inspect.inspect_text(run_of("isotropic"), "t", TEXT)
    assert inspection.effects.rows[0][1] == "40" and len(inspection.chunked.text) == len(TEXT)
    assert "Done on the first 40 bytes of the text." in inspect.effects_legend(inspection)
