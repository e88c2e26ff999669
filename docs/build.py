"""Build the site: python docs/build.py [OUT]. A broken link, or any other warning of Sphinx, is an error.

1. Collect the pages in a temporary folder. README.md is the first. CHANGELOG.md, SECURITY.md, the results in
   tools/results/ and the pages beside the examples are pages, too.
2. In each page, insert what follows from the code (generated.py), and make links, which lead from file to file of the
   repository, lead from page to page.
3. Run Sphinx (conf.py).
"""

from __future__ import annotations

import posixpath
import re
import sys
import tempfile
from pathlib import Path

from generated import ROOT, insert, schema_json, schema_models
from sphinx.cmd.build import build_main

CONTENTS = {
    "Make a lock": ["how-a-lock-is-made", "recipes", "text", "memory", "workers"],
    "Run it": ["exports", "kernels", "gpu", "serving", "publishing"],
    "What a lock is worth": ["audit", "threat-model", "measured"],
    "Reference": ["cli", "api", "schemas", "troubleshooting", "glossary"],
    "Project": ["contributing", "CHANGELOG", "SECURITY"],
}
OUTSIDE = [
    "README.md", "CHANGELOG.md", "SECURITY.md", "lockkit/models/demo/README.md", "examples/*/README.md",
    "tools/results/*.md", "tools/results/*.svg",
]  # fmt: skip
_LINK = re.compile(r"(\]\()(?!\w+:|#|/)([^)#\s]+)")


def main() -> int:
    """Build the site in OUT, by default `site` beside docs/. Returns Sphinx's exit code."""
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "site"
    with tempfile.TemporaryDirectory() as pages:
        collect(Path(pages))
        return build_main(["-q", "-W", "--keep-going", "-E", "-c", str(ROOT / "docs"), pages, str(out)])


def collect(folder: Path) -> None:
    """Write all pages, and the files that they show or link to, into `folder`."""
    inside = [path for suffix in ("md", "svg") for path in (ROOT / "docs").glob(f"*.{suffix}")]
    for path in [*inside, *(path for pattern in OUTSIDE for path in ROOT.glob(pattern))]:
        name = path.relative_to(ROOT).as_posix()
        place = folder / site_path(name)
        place.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".md":
            place.write_text(page(path.read_text(encoding="utf-8"), name), encoding="utf-8")
        else:
            place.write_bytes(path.read_bytes())
    for name, model in schema_models().items():
        (folder / "schemas").mkdir(exist_ok=True)
        (folder / "schemas" / f"{name}.json").write_text(schema_json(model), encoding="utf-8")


def page(text: str, name: str) -> str:
    """The text of a page of the site.

    Args:
        text: the text of the file.
        name: its path in the repository.
    """
    text = insert(page_links(text, name))
    if name == "README.md":
        text += "".join(
            f"\n```{{toctree}}\n:hidden:\n:caption: {title}\n{chr(10).join(pages)}\n```\n"
            for title, pages in CONTENTS.items()
        )
    elif not name.startswith("docs/") and site_path(name).count("/"):
        text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.S)  # the YAML of a model card
        text = "---\norphan: true\n---\n\n" + text
    return text


def site_path(name: str) -> str:
    """The place on the site of a file of the repository."""
    return "index.md" if name == "README.md" else name.removeprefix("docs/")


def page_links(text: str, name: str) -> str:
    """The same text, with links between files of the repository as links between pages of the site."""

    def moved(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(name), link[2]))
        return link[1] + posixpath.relpath(site_path(target), posixpath.dirname(site_path(name)) or ".")

    return _LINK.sub(moved, text)


if __name__ == "__main__":
    sys.exit(main())
