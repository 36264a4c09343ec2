"""Every link within the built site leads somewhere: `python docs/check_links.py out/site`.

Sphinx checks what it resolves itself; this reads the pages as a browser does, anchors included.
Addresses on other hosts are counted, not visited. A page may load nothing from another host.
"""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADED = {"script": "src", "img": "src", "iframe": "src", "link": "href", "source": "src"}


class Page(HTMLParser):
    """The anchors of a page, where its links lead, and what it loads."""

    def __init__(self, path: Path):
        super().__init__()
        self.anchors, self.links, self.loaded = set(), [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        self.anchors |= {values[name] for name in ("id", "name") if values.get(name)}
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])
        if values.get(LOADED.get(tag)):
            self.loaded.append(values[LOADED[tag]])


def faults(site: Path) -> list[str]:
    """A line for every link that leads nowhere, and for everything loaded from another host."""
    pages = {path: Page(path) for path in sorted(site.rglob("*.html"))}
    lines = []
    for path, page in pages.items():
        here = path.relative_to(site)
        for link in [*page.links, *page.loaded]:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                if link in page.loaded and parts.scheme != "data":
                    lines.append(f"{here} loads {link}")
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.exists():
                lines.append(f"{here}: no file for {link}")
            elif parts.fragment and target in pages:
                if unquote(parts.fragment) not in pages[target].anchors:
                    lines.append(f"{here}: no anchor for {link}")
    return lines


def main() -> None:
    site = Path(sys.argv[1]).resolve()
    lines = faults(site)
    print(*lines, f"{len(list(site.rglob('*.html')))} pages, {len(lines)} faults", sep="\n")
    sys.exit(bool(lines))


if __name__ == "__main__":
    main()
