"""Hooks of MkDocs: pages may link to files of the repository outside docs/, as they do on GitHub.

Pictures and Markdown files that a page links to are built into the site. A link to another file becomes plain text.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(?P<picture>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)#:]+)(?P<anchor>#[^)]*)?\)")
BUILT = {".md", ".png", ".svg"}
OUTSIDE = "repository/"


def repository_path(page, target):
    """The path in the repository of what a page of the site links to."""
    source = page.removeprefix(OUTSIDE) if page.startswith(OUTSIDE) else f"docs/{page}"
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), target))


def site_path(path):
    return path.removeprefix("docs/") if path.startswith("docs/") else OUTSIDE + path


def on_files(files, config):
    pages = [file.src_uri for file in files.documentation_pages()]
    for page in pages:
        text = (ROOT / repository_path(page, posixpath.basename(page))).read_text(encoding="utf-8")
        for match in LINK.finditer(text):
            path = repository_path(page, match["target"])
            name = site_path(path)
            if (ROOT / path).suffix in BUILT and (ROOT / path).exists() and files.get_file_from_path(name) is None:
                files.append(File.generated(config, name, abs_src_path=str(ROOT / path)))
                if path.endswith(".md"):
                    pages.append(name)
    return files


def on_page_markdown(markdown, page, config, files):
    source = page.file.src_uri

    def link(match):
        path = repository_path(source, match["target"])
        if not (ROOT / path).exists():
            return match[0]
        if files.get_file_from_path(site_path(path)) is None:
            return match["text"]
        target = posixpath.relpath(site_path(path), posixpath.dirname(source))
        return f"{match['picture']}[{match['text']}]({target}{match['anchor'] or ''})"

    return LINK.sub(link, markdown)
