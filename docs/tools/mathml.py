"""A Markdown extension: formulas become MathML when the site is built, so that no script draws them in the browser.

pymdownx.arithmatex (generic form) finds `$...$` and blocks between `$$`, and wraps their TeX in an element of class
`arithmatex`. This extension turns each such element into MathML, which every current browser can draw.
"""

from __future__ import annotations

import html
import re

from latex2mathml.converter import convert
from markdown import Markdown
from markdown.extensions import Extension
from markdown.postprocessors import Postprocessor

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def as_mathml(found: re.Match[str]) -> str:
    """The element with MathML in place of TeX.

    Raises:
        ValueError: latex2mathml does not know a command of the formula, and would show it as plain text.
    """
    tag, bracket, tex = found.groups()
    mathml = convert(html.unescape(tex).strip(), display="block" if bracket == "[" else "inline")
    if "\\" in mathml:
        raise ValueError(f"a command that latex2mathml does not know: {tex}")
    return f'<{tag} class="formula">{mathml}</{tag}>'


class Formulas(Postprocessor):
    """Puts MathML into a page at the end of its conversion."""

    def run(self, text: str) -> str:
        """Return the page with MathML."""
        return FORMULA.sub(as_mathml, text)


class MathML(Extension):
    """Registers `Formulas`, so that it runs after all other postprocessors."""

    def extendMarkdown(self, md: Markdown) -> None:
        """Add it to `md`."""
        md.postprocessors.register(Formulas(md), "mathml", -10)


def makeExtension(**settings: object) -> MathML:
    """Return the extension. Python-Markdown looks for a function of this name in the module."""
    return MathML(**settings)
