"""A card as text: our section between two marks, our metadata among that of others, all else as it was."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from huggingface_hub.repocard import REGEX_YAML_BLOCK

from hf_parcor.model_card.front_matter import merged_front_matter

_BYTE_ORDER_MARK = "\ufeff"
_LINE = r"(?:\A|(?<=[\r\n]))"
_BEGIN = re.compile(_LINE + r"<!-- hf_parcor:begin(?: (generated|around):([0-9a-f]{64}))? -->")
_END = re.compile(_LINE + r"<!-- hf_parcor:end -->")


class Card(NamedTuple):
    """A card in its parts.

    Attributes:
        opening: All before the front matter: the line `---`.
        front_matter: The text between the lines `---`; "" where there is none.
        closing: The line `---` after it, and the line ending before that.
        before: The text before our section.
        section: Our section with its marks; "" where there is none.
        after: The text after it.
        newline: Its line ending.
        author: Of the text around our section when we last wrote it: "generated" by a Trainer, or "around" for others.
        digest: SHA-256 of that text; "" if unknown.
    """

    opening: str
    front_matter: str
    closing: str
    before: str
    section: str
    after: str
    newline: str
    author: str = ""
    digest: str = ""

    @property
    def is_untouched(self) -> bool:
        """Whether nobody has changed the text around our section since we last wrote it."""
        return self.digest == _digest(self.author, self.front_matter, self.before, self.after)

    @property
    def is_generated(self) -> bool:
        """Whether a Trainer wrote all text but ours, and nobody touched it, so that a Trainer may write it anew."""
        return self.author == "generated" and self.is_untouched


def read_card(text: str) -> Card:
    r"""Return the parts of a card.

    Raises:
        ValueError: Our marks do not come as one pair.

    Examples:
        >>> read_card("---\nlicense: mit\n---\n# Mine\n").before
        '# Mine\n'
    """
    newline = "\r\n" if "\r\n" in text else "\r" if "\r" in text and "\n" not in text else "\n"
    mark = _BYTE_ORDER_MARK if text.startswith(_BYTE_ORDER_MARK) else ""
    match = REGEX_YAML_BLOCK.search(text[len(mark) :])
    if match is None:
        head, body = (f"{mark}---{newline}", "", f"{newline}---{newline}"), text[len(mark) :]
    else:
        closing = match.group(3) if match.group(4) else match.group(3) + newline
        head, body = (mark + match.group(1), match.group(2), closing), text[len(mark) + match.end() :]
    begins, ends = list(_BEGIN.finditer(body)), list(_END.finditer(body))
    if not begins and not ends:
        return Card(*head, body, "", "", newline, "")
    if len(begins) != 1 or len(ends) != 1 or ends[0].start() < begins[0].end():
        raise ValueError(
            f"card: expected one line <!-- hf_parcor:begin --> and one <!-- hf_parcor:end --> after it, got "
            f"{len(begins)} and {len(ends)}; remove what is between them, and the lines themselves"
        )
    start, end = begins[0].start(), ends[0].end()
    author, digest = (group or "" for group in begins[0].groups())
    return Card(*head, body[:start], body[start:end], body[end:], newline, author, digest)


def updated_card(text: str, section: str, metadata: Mapping[str, Any], *, generated: bool = False) -> str:
    r"""Return a card that has our section and metadata; what others wrote survives byte for byte.

    Our section takes the place of our old one, or comes last. Metadata are merged as `merged_front_matter` says.

    Args:
        text: The card as it is; "" for none.
        section: Our section.
        metadata: Our front matter.
        generated: Whether a Trainer wrote the rest of the text, and may write it anew.

    Raises:
        ValueError: The front matter is no YAML mapping, or our marks do not come as one pair.

    Examples:
        >>> card = read_card(updated_card("# Mine, no newline", "## Ours", {"tags": ["robust"]}))
        >>> card.before, card.front_matter, card.is_untouched
        ('# Mine, no newline\n\n', 'tags:\n- robust', True)
    """
    card = read_card(text)
    newline, before, after = card.newline, card.before, card.after
    if not card.section:
        before += newline * (0 if not before or before.endswith(2 * newline) else 2 - before.endswith(newline))
        after = newline
    front_matter = merged_front_matter(card.front_matter, metadata, newline)
    author = "generated" if generated else "around"
    mark = f"<!-- hf_parcor:begin {author}:{_digest(author, front_matter, before, after)} -->"
    ours = "\n".join([mark, section, "<!-- hf_parcor:end -->"]).replace("\n", newline)
    return card.opening + front_matter + card.closing + before + ours + after


def with_metadata(text: str, metadata: Mapping[str, Any]) -> str:
    r"""Return a card with our metadata merged into its own, and nothing else changed.

    Raises:
        ValueError: As in `updated_card`.

    Examples:
        >>> print(with_metadata("# Mine", {"tags": ["robust"]}))
        ---
        tags:
        - robust
        ---
        # Mine
    """
    card = read_card(text)
    front_matter = merged_front_matter(card.front_matter, metadata, card.newline)
    return card.opening + front_matter + card.closing + card.before + card.section + card.after


def _digest(author: str, front_matter: str, before: str, after: str) -> str:
    """Return the digest of what a person may touch; of a kept card its body alone, since libraries rewrite the rest.

    PEFT writes the front matter anew whenever it saves, and the body with other line endings.
    """
    body = "\n".join((before + "\0" + after).splitlines())
    kept = f"{front_matter}\0{before}\0{after}" if author == "generated" else body.strip()
    return hashlib.sha256(kept.encode()).hexdigest()
