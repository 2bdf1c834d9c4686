"""Examples of the README and of docs/ run and print what the pages show; pages and links are complete.

`python` blocks are whole programs and `py` blocks are not run. The `$` lines of `console` blocks are shell commands.
"""

import glob
import importlib
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mplug2_fast.cli import app

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
PROGRAM = re.compile(r"^```python\n(?P<code>.*?)^```\n(?:\n^```\n(?P<output>.*?)^```\n)?", re.DOTALL | re.MULTILINE)
SESSION = re.compile(r"^```console\n(?P<lines>.*?)^```$", re.DOTALL | re.MULTILINE)


def text(page):
    return page.read_text(encoding="utf-8")


def prose(page):
    """The page without code blocks."""
    return re.sub(r"^```.*?^```$", "", text(page), flags=re.DOTALL | re.MULTILINE)


def examples(pattern, *groups):
    return [
        pytest.param(*map(match.group, groups), id=f"{name}-{index}")
        for page, name in zip(PAGES, NAMES, strict=True)
        for index, match in enumerate(pattern.finditer(text(page)))
    ]


@pytest.mark.parametrize(("code", "output"), examples(PROGRAM, "code", "output"))
def test_programs_print_the_output_below_them(code, output, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    exec(compile(code, "<docs>", "exec"), {"__name__": "__docs__"})
    assert capsys.readouterr().out == (output or "")


@pytest.mark.parametrize("lines", examples(SESSION, "lines"))
def test_commands_print_the_lines_below_them(lines, monkeypatch):
    monkeypatch.chdir(ROOT)
    for session in re.split(r"^\$ ", lines, flags=re.MULTILINE)[1:]:
        command, expected = session.split("\n", 1)
        program, *arguments = shlex.split(command)
        assert program == "mplug2-fast"
        found = [sorted(glob.glob(argument)) or [argument] for argument in arguments]
        done = CliRunner().invoke(app, [path for paths in found for path in paths])
        assert (done.stdout.strip(), done.exit_code) == (expected.strip(), 0), done.stderr


def test_messages_of_runs_are_those_of_the_page(tmp_path, monkeypatch):
    """Each line of the sessions in bulk.md is printed, with other numbers."""
    (tmp_path / "videos").mkdir()
    for clip in (ROOT / "examples/moving_shapes/clips").glob("*.mp4"):
        (tmp_path / "videos" / clip.name).write_bytes(clip.read_bytes())
    (tmp_path / "videos/truncated.mp4").write_bytes(clip.read_bytes()[:3000])
    (tmp_path / "videos/notes.md").touch()
    monkeypatch.chdir(tmp_path)
    sessions = re.findall(r"^\$ mplug2-fast (caption .*)\n((?:.+\n)*)", text(DOCS / "bulk.md"), re.MULTILINE)
    assert len(sessions) == 3
    for command, expected in sessions:
        output = CliRunner().invoke(app, shlex.split(command)).output
        for line in filter(None, expected.replace("```", "").split("\n")):
            assert re.sub(r"[\d,.]*\d", "#", line) in re.sub(r"[\d,.]*\d", "#", output).split("\n"), command


def anchors(page):
    """The anchors of a page's headings, as GitHub and MkDocs make them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_resolve(page):
    for target, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]+))?\)", prose(page)):
        if target.startswith("http"):
            continue
        linked = page.parent / target if target else page
        assert linked.exists(), target
        if anchor:
            assert anchor in anchors(linked), f"{target}#{anchor}"


def test_the_navigation_has_every_page():
    nav = (ROOT / "mkdocs.yml").read_text().split("\nnav:\n")[1].split("\nvalidation:")[0]
    listed = re.findall(r": (\S+\.md)$", nav, re.MULTILINE)
    assert sorted(listed) == sorted(page.relative_to(DOCS).as_posix() for page in PAGES[1:])


def test_every_page_is_linked_from_the_readme_or_the_overview():
    linked = "".join(map(text, (ROOT / "README.md", DOCS / "index.md", DOCS / "api/index.md")))
    assert [page.name for page in PAGES[2:] if page.name not in linked] == []


def test_the_api_reference_names_what_exists_and_all_that_is_public():
    pages = "".join(map(text, sorted((DOCS / "api").glob("*.md"))))
    entries = re.findall(r"^::: (\S+)$", pages, re.MULTILINE)
    for entry in entries:
        module, _, name = entry.rpartition(".")
        parent = importlib.import_module(module)
        assert hasattr(parent, name) or importlib.import_module(entry), entry
    documented = {entry.rpartition(".")[2] for entry in entries}
    for module in ("acceleration", "bulk", "checkpoint", "evaluation", "nn", "ops", "predict", "training", "video"):
        public = importlib.import_module(f"mplug2_fast.{module}").__all__
        assert {name for name in public if not name.isupper() or name == "MLP"} <= documented, module


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "performance.md"], ids=lambda page: page.stem)
def test_paragraphs_are_whole(page):
    """No paragraph ends in the middle of a sentence. Notes in performance.md are fragments."""
    for paragraph in re.split(r"\n\s*\n", prose(page)):
        last = paragraph.strip().splitlines()[-1] if paragraph.strip() else ""
        if last and not re.match(r"\s*([#|<\-]|:::|\w+:|!\[|options:)", last):
            assert re.search(r"[.:!?|)`>]\s*$", last), paragraph
