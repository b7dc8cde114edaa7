"""What mkdocs does not know of this tree: pages outside docs/, and links to its files.

The README is the site's first page; CONTRIBUTING.md and tests/README.md are pages too. A link to
any other file of the tree, such as a module, becomes its text: the site holds no sources.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "tests/README.md": "tests.md",
}
"""Pages outside docs/, by their path in the tree: their path in the site."""
_CODE_OR_LINK = re.compile(
    r"^```.*?^```$|`[^`\n]*`(?!\])|\[(?P<text>[^\]]*)\]\((?P<target>[^)\s#]+)(?P<anchor>#[^)\s]*)?\)",
    flags=re.MULTILINE | re.DOTALL,
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    here = page.file.src_uri
    source = next((path for path, uri in PAGES.items() if uri == here), f"docs/{here}")

    def link(match: re.Match[str]) -> str:
        target = match["target"]
        if target is None or "://" in target:
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if not (ROOT / path).exists():
            return match[0]  # mkdocs says that it is broken.
        uri = PAGES.get(path, path.removeprefix("docs/"))
        if files.get_file_from_path(uri) is None:
            return match["text"]
        relative = posixpath.relpath(uri, posixpath.dirname(here) or ".")
        return f"[{match['text']}]({relative}{match['anchor'] or ''})"

    return _CODE_OR_LINK.sub(link, markdown)
