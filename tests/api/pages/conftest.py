"""Pages as a parser of HTML sees them."""

from html.parser import HTMLParser

VOID = frozenset({"meta", "link", "input", "img", "br", "rect", "line", "circle", "path"})


class Html(HTMLParser):
    """Elements with their attributes, texts, and forms' fields."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())

    def values(self, tag: str, name: str) -> list[str]:
        """Values of an attribute of all elements of a kind."""
        return [value for found, attrs in self.elements if found == tag and (value := attrs.get(name)) is not None]

    def field(self, name: str) -> str:
        """The value of the first hidden or visible input of that name."""
        return next(
            attrs["value"] or "" for tag, attrs in self.elements if tag == "input" and attrs.get("name") == name
        )
