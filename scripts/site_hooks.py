"""Hooks of mkdocs.yml: the README and other pages outside docs/ are part of the site, and their links work there too.

On the repository's page a link leads from file to file. The site has its own layout (PLACES), so each link is led to
where its file lies in it. A link to a file that the site does not have becomes plain text.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
PLACES = {
    "README.md": "index.md",
    "README.zh-CN.md": "zh/index.md",
    "CHANGELOG.md": "changelog.md",
    "data/README.md": "sundrel/data.md",  # not data/: docs/data.md is there
    "recipes/README.md": "recipes/index.md",
}
COPIED = ("recipes/**/*.yaml", "recipes/**/*.py", "recipes/**/*.jinja")
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]*)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    places = dict(PLACES)
    places |= {file.relative_to(ROOT).as_posix(): "" for pattern in COPIED for file in ROOT.glob(pattern)}
    for source, target in places.items():
        if (ROOT / source).exists():
            files.append(File.generated(config, target or source, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    here = page.file.src_uri
    source = next((source for source, target in PLACES.items() if target == here), f"docs/{here}")

    def led(found: re.Match[str]) -> str:
        picture, text, link, heading = found[1], found[2], found[3], found[4] or ""
        if not link or "://" in link or link.startswith("mailto:"):
            return found[0]
        named = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
        target = PLACES.get(named, named.removeprefix("docs/"))
        if files.get_file_from_path(target) is None:
            return text if (ROOT / named).exists() else found[0]
        return f"{picture}[{text}]({posixpath.relpath(target, posixpath.dirname(here) or '.')}{heading})"

    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if part.startswith("```") else LINK.sub(led, part) for part in parts)
