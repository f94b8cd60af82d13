"""HTML pages as their readers see them."""

import re
from html.parser import HTMLParser


class Page(HTMLParser):
    """The tags, ids, addresses and text of a page, and the rows of text of its tables, and of its maps."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.ids, self.addresses, self.texts, self.tables, self._in = [], [], [], [], {}, None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self._in = tag
        self.tags.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in ("href", "src", "xlink:href", "data"):
                self.addresses.append(value)
        if tag == "tr":
            self.tables[self._caption].append([])
        if tag == "table":
            kind = "table" if ("class", "data") in attributes else "map"
            self._caption = f"{kind} {self.tags.count('table')}"
            self.tables[self._caption] = []

    def rows_of(self, kind):
        return [rows for name, rows in self.tables.items() if name.startswith(kind)]

    def handle_data(self, data):
        if text := data.strip():
            self.texts.append(text)
            if self._in in ("th", "td"):
                self.tables[self._caption][-1].append(text)


def assert_needs_nothing_else(page: Page, text: str) -> None:
    """It loads nothing, and says so itself: whatever is in it, a browser would refuse to."""
    assert "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:" in text
    assert not {"iframe", "object"} & set(page.tags)
    assert all(address.startswith(("#", "data:")) for address in page.addresses)
    assert not re.search(r"@import|url\((?!#)", text)
