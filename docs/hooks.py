"""Hooks of mkdocs: README is the first page, a link out of ``docs/`` brings its file along, and ``cli.md`` lists all options.

``api.md`` gets the docstrings of the public names. So the same Markdown can be read on a repository's page and on the
site, and ``mkdocs build --strict`` checks its links.
"""

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
PAGES = {name: name for name in ("CONTRIBUTING.md", "CHANGELOG.md")} | {
    "index.md": "README.md",
    "tables.md": "benchmarks/README.md",
}
INHERITED = "build_model, adapted, chain, link, seed, trained_parameters, checkpoint_activations, compile_model, shard_model"
OPTIONS = {"COLAModule": f"\n    options:\n      inherited_members: [{INHERITED}]"}
NAME = re.compile(r"^from \.([\w.]+) import (\w+) as", re.MULTILINE)  # a public name after its file, in the package's stub
LINK = re.compile(r"(\]\()([^)#:]+)((?:#[^)]*)?\))")  # to a file, not an address


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds README and what the pages link to outside of ``docs/``."""
    for path, source in PAGES.items():
        files.append(File.generated(config, path, abs_src_path=str(ROOT / source)))
    texts = [*(ROOT / "docs").glob("*.md"), *(ROOT / source for source in PAGES.values())]
    linked = {(text.parent / path).resolve() for text in texts for _, path, _ in LINK.findall(text.read_text())}
    for target in sorted(linked):
        path = target.relative_to(ROOT).as_posix()
        if target.is_file() and not path.startswith("docs/") and path not in PAGES.values():
            files.append(File.generated(config, path, abs_src_path=str(target)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Rewrites links for the site, where README is ``index.md`` and all pages lie in one folder."""
    folder = (ROOT / PAGES.get(page.file.src_path, f"docs/{page.file.src_path}")).parent
    names = {source: path for path, source in PAGES.items()}

    def moved(match: re.Match[str]) -> str:
        path = (folder / match[2]).resolve().relative_to(ROOT).as_posix()
        return f"{match[1]}{names.get(path, path.removeprefix('docs/'))}{match[3]}"

    text = LINK.sub(moved, markdown)
    ends = {"cli.md": all_options, "api.md": docstrings}
    return f"{text}\n\n{ends[page.file.src_path]()}" if page.file.src_path in ends else text


def docstrings() -> str:
    """What makes mkdocstrings show the docstrings of the public names."""
    stub = (ROOT / "cola_lightning" / "__init__.pyi").read_text()
    names = [f"::: cola_lightning.{path}.{name}{OPTIONS.get(name, '')}" for path, name in NAME.findall(stub)]
    return "\n\n".join(["## Docstrings", *names])


def all_options() -> str:
    """What ``options.py`` in this folder makes of the package."""
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import options
    finally:
        sys.path.pop(0)
    return options.markdown()
