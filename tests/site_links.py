"""Checks a built documentation site: ``python -m tests.site_links build/site``."""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """The anchors and links of a page, and the files that a browser loads to show it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Sorts the attributes of one tag."""
        found = dict(attrs)
        self.anchors |= {found[name] for name in ("id", "name") if found.get(name)}
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        if tag == "link" and found.get("rel") in ("stylesheet", "preload", "icon", "shortcut icon"):
            self.loaded.append(found["href"])
        if tag in ("script", "img", "iframe", "source") and found.get("src"):
            self.loaded.append(found["src"])


def problems(site: Path) -> list[str]:
    """Internal links without a target, and files that are loaded from other hosts."""
    pages = {path.resolve(): Page(path.read_text()) for path in site.rglob("*.html")}
    pages = {path: page for path, page in pages.items() if "_static" not in path.parts}  # parts of the theme
    found = []
    for path, page in pages.items():
        name = path.relative_to(site.resolve())
        found += [f"{name} loads {url}" for url in page.loaded if urlsplit(url).netloc]
        for url in page.links + page.loaded:
            parts = urlsplit(url)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.is_file():
                found.append(f"{name} links to {url}, which does not exist")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
                found.append(f"{name} links to {url}, which has no such section")
    for path in site.rglob("*.css"):
        for url in re.findall(r"(?:@import|url\()\s*[\"']?(https?://[^\"')\s]+)", path.read_text()):
            found.append(f"{path.relative_to(site)} loads {url}")
    return found


if __name__ == "__main__":
    (folder,) = map(Path, sys.argv[1:])
    if found := problems(folder):
        sys.exit("\n".join(found))
    print(f"{len(list(folder.rglob('*.html')))} pages, no broken link, nothing loaded from another host")
