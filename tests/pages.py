"""Pages read into elements, for tests of what is in them; no browser is needed."""

from html.parser import HTMLParser

VOID = {"meta", "link", "input", "br", "img"}


class Element:
    """An element of a page: its tag, attributes, children, and the text of all of it."""

    def __init__(self, tag, attributes):
        self.tag, self.attributes, self.children = tag, dict(attributes), []

    @property
    def text(self):
        parts = (c if isinstance(c, str) else c.text for c in self.children)
        return "".join(parts)

    def find(self, tag, **attributes):
        """All elements of a tag, or of any, that have these attributes (a_b for a-b)."""
        wanted = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items()}
        found = []
        for child in self.children:
            if isinstance(child, Element):
                if tag in (None, child.tag) and wanted.items() <= child.attributes.items():
                    found.append(child)
                found += child.find(tag, **attributes)
        return found


class Reader(HTMLParser):
    """Reads a page into elements; raises where tags do not match."""

    def __init__(self, page):
        super().__init__()
        self.open = [Element("page", {})]
        self.feed(page)
        self.close()
        assert len(self.open) == 1, f"not closed: {self.open[-1].tag}"

    def handle_starttag(self, tag, attrs):
        assert len({name for name, _ in attrs}) == len(attrs), f"an attribute twice: {attrs}"
        element = Element(tag, attrs)
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open.pop().tag == tag

    def handle_data(self, data):
        self.open[-1].children.append(data)


def read(page):
    """The elements of a page that is given as text."""
    return Reader(page).open[0]


def plain(text):
    """A text as it is shown: any run of spaces and ends of lines is one space."""
    return " ".join(text.split())


def targets(page):
    """All that a page's elements lead to."""
    names = ("href", "src", "srcset", "action", "data", "poster")
    found = (element.attributes.get(name) for element in page.find(None) for name in names)
    return [target for target in found if target is not None]


def handlers(page):
    """All attributes of a page's elements that would run a script."""
    names = {name for element in page.find(None) for name in element.attributes}
    return [name for name in names if name.startswith("on")]
