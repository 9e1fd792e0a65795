"""A page as a browser's parser and a screen reader meet it: shared by the tests of the report and of token weights."""

import base64
import hashlib
import re
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlparse

VOID = {"meta", "link", "br", "path", "circle", "rect", "line", "use", "image", "img", "hr", "input", "col", "wbr"}


class Page(HTMLParser):
    """Balance of the tags, and everything that would be fetched or run."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.errors: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        self.errors += [f"<{tag}> is not closed" for tag in self.open]

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.errors.append(f"</{tag}> at {self.getpos()} closes something else")

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "title", "script"):
            self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]

    def words(self) -> str:
        return " ".join("".join(self.text).split())


def assert_sound(path: Path) -> Page:
    """Well-formed, self-contained, without a script that its policy does not name, with what a screen reader needs."""
    source = path.read_text(encoding="utf-8")
    page = Page(source)
    assert page.errors == []
    assert page.all("html")[0]["lang"] == "en" and len(page.all("h1")) == 1
    assert not page.all("iframe") and not page.all("object") and not page.all("form") and not page.all("base")
    assert_policy(page, source)
    for tag, attrs in page.tags:
        assert not [name for name in attrs if name.startswith("on")], tag
        for name in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
            link = attrs.get(name) or ""
            assert not urlparse(link).netloc and urlparse(link).scheme in ("", "data"), (tag, link)
            if link and not link.startswith(("#", "data:")):
                target, _, anchor = link.partition("#")
                assert (path.parent / target).is_file(), link
                assert not anchor or f'id="{anchor}"' in _text_of((path.parent / target).resolve()), link
    styles = " ".join(
        re.findall(r"<style.*?</style>", source, flags=re.S) + [a.get("style") or "" for _, a in page.tags]
    )
    assert "@import" not in styles
    assert all(target.startswith(("#", "data:")) for target in re.findall(r"url\(['\"]?(.*?)['\"]?\)", styles))
    own_ids = [a["id"] for tag, a in page.tags if "id" in a and tag in ("h2", "h3", "main", "section", "div")]
    assert len(own_ids) == len(set(own_ids))
    anchors = {a["href"][1:] for a in page.all("a") if (a.get("href") or "").startswith("#")}
    assert anchors <= set(own_ids)
    assert all(a.get("scope") in ("col", "row") for a in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table"))
    for svg in page.all("svg"):
        assert svg.get("aria-hidden") == "true" or (svg.get("role") == "img" and svg.get("aria-label"))
    return page


@cache
def _text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def assert_policy(page: Page, source: str) -> None:
    """The policy forbids the network and every script but those of its hashes, which are the page's only ones."""
    metas = page.all("meta")
    (policy,) = (meta["content"] for meta in metas if meta.get("http-equiv") == "Content-Security-Policy")
    rules = dict(rule.strip().split(" ", 1) for rule in (policy or "").split(";"))
    scripts = re.findall(r"<script([^>]*)>(.*?)</script>", source, flags=re.S)
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for _, text in scripts]
    assert len(scripts) == len(page.all("script")) <= 2 and not any(attributes for attributes, _ in scripts)
    expected = {"default-src": "'none'", "style-src": "'unsafe-inline'", "img-src": "data:"}
    if hashes:
        expected["script-src"] = " ".join(f"'sha256-{digest}'" for digest in hashes)
    assert rules == expected
