"""A chat template that shows whose text it writes: the same program, with marks where it turns to a message.

Each loop of the template that reaches a message, by its loop variable or by a number, writes a mark when it begins with
it and when it is done; `{% generation %}` writes one as well. Without its marks the text is the template's own, which
whoever uses it must check. The marks are blocks that sit tag on tag beside the template's own tags, so that no
whitespace changes hands.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

from jinja2 import Environment, TemplateSyntaxError
from jinja2.lexer import newline_re

KEY = "bitwright_turn"
"""The field of a message that holds its number."""
OPENS, CLOSES, TOUCHES, GENERATES, ENDS = "octge"
BLOCKS = frozenset({"for", "if", "macro", "call", "filter", "block", "with", "autoescape", "generation", "trans"})


@dataclass(frozen=True)
class Marks:
    """The characters around a mark: some that neither the template nor the row writes."""

    first: str
    last: str

    @classmethod
    def unlike(cls, text: str) -> "Marks":
        """Two characters of private use that are not in a text."""
        unused = (chr(code) for code in range(0xF0000, 0xFFFFE) if chr(code) not in text)
        return cls(next(unused), next(unused))


@dataclass(frozen=True)
class Piece:
    """A part of a text: whose message it was written for, if any, and whether `{% generation %}` is around it."""

    first: int
    last: int
    owner: int | None
    generated: bool


@dataclass(frozen=True)
class _Tag:
    """A block tag: its words, where it begins and where its end begins in the source."""

    words: tuple[str, ...]
    begin: int
    opener: str
    end: int


@cache
def marked(source: str, marks: Marks) -> str | None:
    """The template with marks; None where its text cannot be read as one."""
    try:
        tags = list(_tags(normal := "\n".join(newline_re.split(source)[::2])))
    except (TemplateSyntaxError, ValueError):
        return None
    inserted = sorted(_insertions(tags, marks), key=lambda each: each[0])
    cuts = [0, *(place for place, _ in inserted), len(normal)]
    texts = ["", *(text for _, text in inserted)]
    return "".join(text + normal[first:last] for text, (first, last) in zip(texts, pairwise(cuts), strict=True))


def pieces(text: str, marks: Marks) -> tuple[str, list[Piece]]:
    """The text without its marks, and its parts in order."""
    plain, ordered, size = [], [], 0
    loops: list[tuple[str, int | None]] = []
    depth = 0
    first, *rest = text.split(marks.first)
    marked_segments = [each.partition(marks.last) for each in rest]
    for mark, segment in [("", first), *((mark, segment) for mark, _, segment in marked_segments)]:
        kind, _, what = mark.partition(":")
        if kind == GENERATES:
            depth += 1
        elif kind == ENDS:
            depth -= 1
        elif kind:
            loops = _after(loops, kind[0], kind[1:], int(what) if what else None)
        if segment:
            owner = next((index for _, index in reversed(loops) if index is not None), None)
            ordered.append(Piece(size, size + len(segment), owner, depth > 0))
            plain.append(segment)
            size += len(segment)
    return "".join(plain), ordered


def _after(
    loops: list[tuple[str, int | None]], kind: str, loop: str, index: int | None
) -> list[tuple[str, int | None]]:
    """The loops that are open after a mark. A loop that begins anew has ended its last round, whatever it wrote."""
    if kind == TOUCHES:
        return [*loops[:-1], (loops[-1][0], index)] if loops and loops[-1][1] is None else loops
    names = [name for name, _ in loops]
    before = loops[: names.index(loop)] if loop in names else loops
    return [*before, (loop, index)] if kind == OPENS else before


def _tags(source: str) -> Iterator[_Tag]:
    """The block tags of a template, with their positions: the lexer gives the words, and drops only whitespace."""
    words: list[str] = []
    place, begin, opener = 0, -1, ""
    for _, kind, value in Environment(trim_blocks=True, lstrip_blocks=True, autoescape=True).lex(source):
        position = source.index(value, place)
        if source[place:position].strip():
            raise ValueError("the lexer's words are not the template's")
        place = position + len(value)
        if kind == "block_begin":
            words, begin, opener = [], position, value
        elif kind == "block_end":
            yield _Tag(tuple(words), begin, opener, position)
            begin = -1
        elif begin >= 0 and value.strip():
            words.append(value)


def _insertions(tags: list[_Tag], marks: Marks) -> Iterator[tuple[int, str]]:
    """Places in the source, and what is written there."""
    open_tags: list[tuple[str, str, str]] = []
    for number, tag in enumerate(tags):
        name, *rest = tag.words or ("",)
        loop = next((each for each in reversed(open_tags) if each[0] == "for"), None)
        if name == "for":
            open_tags.append(("for", str(number), rest[0] if rest[1:2] == ["in"] else ""))
            if rest[1:2] == ["in"]:
                yield tag.end, _behind(_on_message(rest[0], marks, f"{OPENS}{number}", numbers=True))
        elif name in BLOCKS or (name == "set" and "=" not in rest):
            open_tags.append((name, "", ""))
        elif name == "set" and rest[1:2] == ["="]:
            yield tag.end, _behind(_on_message(rest[0], marks, TOUCHES))
        ends_loop = (name in ("endfor", "else") and open_tags and open_tags[-1][0] == "for") or name in (
            "break",
            "continue",
        )
        if ends_loop and loop is not None and loop[2]:
            yield tag.begin, _before(_on_message(loop[2], marks, f"{CLOSES}{loop[1]}", numbers=True), tag.opener)
        if name == "generation":
            yield tag.end, _behind(_always(marks, GENERATES))
        elif name == "endgeneration":
            yield tag.end, _behind(_always(marks, ENDS))
        if name.startswith("end") and open_tags:
            open_tags.pop()


def _on_message(variable: str, marks: Marks, kind: str, *, numbers: bool = False) -> str:
    """The inside of a block that writes a mark if the variable is a message, or, of a loop, a number."""
    mark = f"{{{{- '{marks.first}{kind}:' ~ {variable}['{KEY}'] ~ '{marks.last}' -}}}}"
    other = f"{{%- elif {variable} is number -%}}{{{{- '{marks.first}{kind}:{marks.last}' -}}}}" if numbers else ""
    return f"if {variable} is mapping and '{KEY}' in {variable} -%}}{mark}{other}{{%- endif "


def _always(marks: Marks, kind: str) -> str:
    return f"if true -%}}{{{{- '{marks.first}{kind}{marks.last}' -}}}}{{%- endif "


def _behind(block: str) -> str:
    """A block right behind a tag, whose end becomes its own."""
    return "%}{%- " + block


def _before(block: str, opener: str) -> str:
    """A block right before a tag, whose beginning becomes its own."""
    return f"{opener} {block}-%}}"
