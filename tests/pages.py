"""HTML pages as their readers see them."""

import re
from html.parser import HTMLParser


class Page(HTMLParser):
    """The tags, ids, addresses and text of a page, and each table's rows of text by its caption."""

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
            self._caption = f"table {self.tags.count('table')}"
            self.tables[self._caption] = []

    def handle_data(self, data):
        if text := data.strip():
            self.texts.append(text)
            if self._in in ("th", "td"):
                self.tables[self._caption][-1].append(text)


def assert_needs_nothing_else(page: Page, text: str) -> None:
    """It runs nothing and loads nothing."""
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert all(address.startswith(("#", "data:")) for address in page.addresses)
    assert not re.search(r"@import|url\((?!#)", text)
