"""MkDocs hooks: publish files of the repository root as pages, and keep one set of links for GitHub and for
the site.
"""

import re
from pathlib import Path
from posixpath import normpath, relpath
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = {  # file of the repository -> its place on the site
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/study/study.svg": "images/study.svg",
}
LINK = re.compile(r"(\]\()(?!\w+:|#)([^)\s#]+)")


def on_files(files: Any, config: Any) -> Any:
    """Add the files of `PUBLISHED` to those of `docs/`."""
    for source, place in PUBLISHED.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Replace each link to a file of the repository by a link to its place on the site."""
    sources = {place: source for source, place in PUBLISHED.items()}
    source = sources.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    here = page.file.src_uri

    def to_site(match: re.Match[str]) -> str:
        target = normpath(f"{Path(source).parent.as_posix()}/{match[2]}")
        place = PUBLISHED.get(target, target.removeprefix("docs/"))
        return match[1] + relpath(place, Path(here).parent.as_posix())

    return LINK.sub(to_site, markdown)
