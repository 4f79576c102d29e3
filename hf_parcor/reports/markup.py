"""HTML and Markdown in which no name can break out of its place."""

from __future__ import annotations

import re
from xml.etree.ElementTree import Element

# Between letters and digits an underscore is one, and stays readable in a terminal.
_PUNCTUATION = re.compile(r"([\\`*{}\[\]<>#|!~&$]|(?<![^\W_])_|_(?![^\W_]))")
_DOT = re.compile(r"(?<=\w)(?<!\d)(?=\.\w)|(?<=\d)(?=\.[^\W\d])")  # not that of a decimal number


def printable(text: str) -> str:
    r"""Return text on one line, with what cannot be printed replaced.

    Examples:
        >>> printable("two\n lines, a bell \a")
        'two lines, a bell �'
    """
    return " ".join(_replaced(text).split())


def element(tag: str, *children: Element | str, **attributes: str) -> Element:
    """Return an element; texts and attributes are escaped when the tree is written, so they stay what they are.

    Args:
        tag: Its name.
        children: Elements and texts, in order.
        attributes: `class_` stands for `class`, `stroke_width` for `stroke-width`.

    Examples:
        >>> from xml.etree.ElementTree import tostring
        >>> made = element("p", "a", " < ", element("b", "c"), " & ", "d", class_="soft")
        >>> tostring(made, encoding="unicode")
        '<p class="soft">a &lt; <b>c</b> &amp; d</p>'
    """
    made = Element(tag, {name.rstrip("_").replace("_", "-"): printable(value) for name, value in attributes.items()})
    for child in children:
        if isinstance(child, Element):
            made.append(child)
        elif len(made):
            made[-1].tail = (made[-1].tail or "") + _replaced(child)
        else:
            made.text = (made.text or "") + _replaced(child)
    return made


def breakable(text: str) -> list[Element | str]:
    r"""Return text that may go on in the next line before a dot inside a name; who copies it gets no break.

    Examples:
        >>> [part if isinstance(part, str) else part.tag for part in breakable("layer.0.attention takes 4.5 bits.")]
        ['layer', 'wbr', '.0', 'wbr', '.attention takes 4.5 bits.']
    """
    first, *others = _DOT.split(text)
    return [first, *(part for other in others for part in (Element("wbr"), other))]


def text_of(text: str) -> str:
    r"""Return Markdown that shows the text as it is, on one line, in a cell or out of it.

    Examples:
        >>> print(text_of("a|b <i> *c* _d_ e_f"))
        a\|b \<i\> \*c\* \_d\_ e_f
    """
    return _PUNCTUATION.sub(r"\\\1", printable(text))


def code_of(code: str) -> str:
    """Return a Markdown code span; its fence is longer than any run of backticks inside.

    Examples:
        >>> print(code_of("a`b"))
        ``a`b``
    """
    line = printable(code)
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    space = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{space}{line}{space}{fence}"


def _replaced(text: str) -> str:
    """Return text without newlines, and without controls, halves of characters and marks that turn its direction."""
    return "".join(
        letter if letter.isprintable() else " " if letter.isspace() else "\N{REPLACEMENT CHARACTER}" for letter in text
    )
