"""What the site needs beyond Markdown: docstrings with Sphinx's markup, and links that lead out of the site."""

from __future__ import annotations

import re
from pathlib import Path
from textwrap import dedent, indent

import griffe

_LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]+)\]\((?P<target>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")
_INCLUDED = re.compile(r'^--8<-- "(?P<path>[^"]+)"$', re.MULTILINE)
_DEFINITION = re.compile(r":math:`(?P<math>[^`]+)`|:[a-z]+:`(?P<short>~?)(?P<name>[\w.]+)`")
_MATH_BLOCK = re.compile(
    r"^(?P<margin> *)\.\. math::(?P<first>[^\n]*)\n(?P<rest>(?:(?P=margin) +[^\n]+\n|\n)*)", re.MULTILINE
)


def on_page_markdown(markdown: str, *, page, config, files) -> str:
    """Links to files of the project that are no pages: the text alone, as there is nothing to lead to.

    A line `--8<-- "FILE"` includes a file that stands beside docs/, the changelog: its links to pages lose that folder.
    """
    folder = Path(config.docs_dir, page.file.src_uri).parent
    root = Path(config.config_file_path).parent
    markdown = _INCLUDED.sub(lambda line: (root / line["path"]).read_text().replace("](docs/", "]("), markdown)

    def replaced(link: re.Match[str]) -> str:
        target = link["target"]
        if "://" in target or (folder / target).resolve().is_relative_to(config.docs_dir):
            return link[0]
        return link["text"]

    return _LINK.sub(replaced, markdown)


class SphinxMarkup(griffe.Extension):
    """Sphinx's roles become links to the API pages, its math directives become TeX between dollars."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: object) -> None:
        _translate(pkg)


def _translate(thing: griffe.Object) -> None:
    if thing.docstring is not None:
        thing.docstring.value = translated(thing.docstring.value, thing)
    for member in thing.members.values():
        if not member.is_alias:
            _translate(member)


def translated(text: str, scope: griffe.Object) -> str:
    return _DEFINITION.sub(lambda role: _role(role, scope), _MATH_BLOCK.sub(_math_block, text))


def _math_block(block: re.Match[str]) -> str:
    formula = dedent(block["rest"]).strip() or block["first"].strip()
    # Sphinx aligns at & and breaks at \\ of itself.
    if "&" in formula:
        formula = f"\\begin{{aligned}}\n{formula}\n\\end{{aligned}}"
    return indent(f"$$\n{formula}\n$$\n\n", block["margin"])


def _role(role: re.Match[str], scope: griffe.Object) -> str:
    if role["math"]:
        return f"${role['math']}$"
    name = role["name"]
    shown = name.rpartition(".")[2] if role["short"] else name
    try:
        path = name if name.startswith("m2mkd_fast.") else scope.resolve(name)
    except griffe.NameResolutionError:
        return f"`{shown}`"
    # Optional: a thing without a place on the API pages keeps its name, and is no error.
    return f'<autoref identifier="{path}" optional hover><code>{shown}</code></autoref>'
