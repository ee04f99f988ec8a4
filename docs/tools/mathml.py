"""A Markdown extension: formulas become MathML when the site is built, so that no script draws them in the browser.

pymdownx.arithmatex (generic form) finds `$...$` and blocks between `$$`, and wraps their TeX in an element of class
`arithmatex`. This turns each such element into MathML, which every current browser draws by itself.
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
        ValueError: latex2mathml does not know a command of the formula; it would show it as it is.
    """
    tag, bracket, tex = found.groups()
    mathml = convert(html.unescape(tex).strip(), display="block" if bracket == "[" else "inline")
    if "\\" in mathml:
        raise ValueError(f"a command that latex2mathml does not know: {tex}")
    return f'<{tag} class="formula">{mathml}</{tag}>'


class Formulas(Postprocessor):
    """Rewrites a page that is otherwise done."""

    def run(self, text: str) -> str:
        """Return the page with MathML."""
        return FORMULA.sub(as_mathml, text)


class MathML(Extension):
    """Registers the rewriting, after all other postprocessors have put back what they had set aside."""

    def extendMarkdown(self, md: Markdown) -> None:
        """Add it to `md`."""
        md.postprocessors.register(Formulas(md), "mathml", -10)


def makeExtension(**settings: object) -> MathML:
    """What Python-Markdown looks for in a module."""
    return MathML(**settings)
