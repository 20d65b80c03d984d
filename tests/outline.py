"""The elements of a page of HTML."""

from html.parser import HTMLParser

VOID = {"meta", "link", "img", "br", "hr", "input"}


class Outline(HTMLParser):
    """Elements of a page with their attributes and texts; fails where tags do not close in order."""

    def __init__(self, page: str):
        super().__init__()
        self.open, self.elements = [], []
        self.feed(page)
        self.close()
        assert not self.open, f"{self.open} are not closed"

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes), []))
        if tag not in VOID:
            self.open.append((tag, self.elements[-1]))

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes), []))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop()[0] == tag, f"</{tag}> closes another element"

    def handle_data(self, text):
        for _, (_, _, texts) in self.open:
            texts.append(text)

    def all(self, tag: str) -> list[tuple[dict, str]]:
        return [
            (attributes, " ".join("".join(texts).split())) for name, attributes, texts in self.elements if name == tag
        ]
