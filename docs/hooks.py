"""What the site needs beside mkdocs.yml: the reference, pages that stand outside of docs/, links into the source, and docstrings shown as written."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from griffe import Extension, Object
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
LAYOUT = ROOT / "build" / "docs" / "markovia"
# Where the packages stand in the checkout, by the name that they are imported by.
PACKAGES = {"markovia": "markovia", "markovia.envs": "envs", "markovia.agents": "agents", "markovia.algos": "algos"}
# Pages that stand outside of docs/, and their pictures; in the site they stand at the same place.
OUTSIDE = ("SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/results/*.md", "benchmarks/results/*.png")
SOURCE_LINK = re.compile(r"\[([^\]]+)\]\(\.\./([^)#]+)\.py#L(\d+)\)")


def on_startup(**_: Any) -> None:
    """Lay the sources out in build/docs as they are installed: griffe reads files, and in a checkout envs/ stands beside markovia/."""
    shutil.rmtree(LAYOUT, ignore_errors=True)
    for name, folder in PACKAGES.items():
        for file in (ROOT / folder).rglob("*.py"):
            target = LAYOUT.joinpath(*name.split(".")[1:], file.relative_to(ROOT / folder))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)


def packages() -> list[Path]:
    """The folders of packages below build/docs."""
    return sorted(f.parent for f in LAYOUT.rglob("__init__.py"))


def modules(folder: Path) -> list[str]:
    """The public modules that lie in a folder, the package itself first, by the name that they are imported by."""
    package = ".".join(folder.relative_to(LAYOUT.parent).parts)
    names = sorted(f.stem for f in folder.glob("*.py") if not f.stem.startswith("_"))
    return [package, *(f"{package}.{name}" for name in names)]


def outside() -> list[str]:
    """The pages and pictures of OUTSIDE, as paths from the root."""
    return sorted(f.relative_to(ROOT).as_posix() for pattern in OUTSIDE for f in ROOT.glob(pattern))


def on_config(config: Any) -> Any:
    """What is found in the tree stands last in the navigation: tables of results, and the reference with one page per package."""
    config.nav.append({"Measured": [path for path in outside() if re.fullmatch(r"benchmarks/.*\.md", path)]})
    config.nav.append({"Reference": [f"api/{modules(folder)[0]}.md" for folder in packages()]})
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of the reference, and those that stand outside of docs/."""
    for folder in packages():
        package, *names = modules(folder)
        head = f"# {package}\n\n::: {package}\n    options: {{members: false, show_root_heading: false}}"
        files.append(File.generated(config, f"api/{package}.md", content="\n\n".join([head, *(f"::: {name}" for name in names)])))
    for path in outside():
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links to a line of the source lead to that name in the reference, where its source is shown; those out of docs/, and back, to the page."""
    if page.file.src_uri in outside():
        return markdown.replace("](docs/", "](")
    return SOURCE_LINK.sub(in_reference, markdown).replace("](../", "](")


def in_reference(link: re.Match[str]) -> str:
    """A link to a name of the reference; plain text where the name is not public."""
    name, path, line = link.groups()
    identifier = f"markovia.{path.replace('/', '.')}.{name}"
    return f'<autoref optional identifier="{identifier}" title="{path}.py:{line}">{name}</autoref>'


def on_page_content(html: str, **_: Any) -> str:
    """Files are named as they stand in the checkout, not in the copy of it."""
    return re.sub(r"build/docs/(markovia/(?=(envs|agents|algos)/))?", "", html)


class Plain(Extension):
    """Docstrings are plain text with equations and aligned columns: their first sentence is Markdown, the rest is shown as it stands.

    Environments' docstrings have Gymnasium's headings, they are Markdown as a whole.
    """

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None and "\n## " not in obj.docstring.value:
            head, rest = first_sentence(obj.docstring.value)
            obj.docstring.value = escaped(head) + (f"\n\n```text\n{rest}\n```" if rest else "")


def first_sentence(text: str) -> tuple[str, str]:
    """The lines up to the first one that ends a sentence or a paragraph, and those behind it."""
    lines = text.strip().splitlines()
    end = next((i for i, line in enumerate(lines) if line.rstrip().endswith((".", ":", "]")) or not line.strip()), len(lines) - 1)
    return "\n".join(lines[: end + 1]).strip(), "\n".join(lines[end + 1 :]).strip("\n")


def escaped(text: str) -> str:
    """Markdown whose stars, brackets and the like are characters; what stands between backticks is code."""
    parts = text.split("`")
    return "`".join(part if i % 2 else re.sub(r"([*_\[\]\\])", r"\\\1", part).replace("<", "&lt;") for i, part in enumerate(parts))
