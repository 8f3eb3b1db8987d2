"""The documentation site as it is built: from a folder, without a server or a network."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import pytest
from browser import browser
from code_blocks import ROOT

pytestmark = pytest.mark.slow

LOADED = {
    ("script", "src"),
    ("link", "href"),
    ("img", "src"),
    ("source", "src"),
    ("iframe", "src"),
}
"""What a browser fetches by itself; a link (`a`) only where it is followed."""


class References(HTMLParser):
    """What a page refers to.

    Attributes:
        loaded: addresses of scripts, styles, pictures.
        linked: addresses of links.
    """

    def __init__(self, path):
        super().__init__()
        self.loaded, self.linked = [], []
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if (tag, name) in LOADED and ("rel", "canonical") not in attrs:
                self.loaded.append(value)
            if (tag, name) == ("a", "href"):
                self.linked.append(value)


def build(folder, config, **environment):
    """Builds the site into a folder, as `make docs` does."""
    command = ["-m", "mkdocs", "build", "--strict", "--quiet", "--config-file", str(ROOT / config)]
    subprocess.run(
        [sys.executable, *command, "--site-dir", str(folder)],
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"} | environment,
        cwd=ROOT,
        check=True,
    )
    return folder


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("material", reason="needs mkdocs-material: make docs")
    return build(tmp_path_factory.mktemp("site"), "mkdocs.yml")


@pytest.fixture(scope="module")
def page():
    with browser() as started:
        yield started


def pages_in(site):
    found = sorted(site.rglob("*.html"))
    sources = [*(ROOT / "docs").rglob("*.md"), *(ROOT / "docs" / "notebooks").glob("*.ipynb")]
    assert len(found) == 1 + len(sources)
    # The page of a server for addresses that do not exist names everything from the server's root.
    return [path for path in found if path.name != "404.html"]


def test_nothing_is_fetched_from_elsewhere(site):
    for path in pages_in(site):
        loaded = References(path).loaded
        assert len(loaded) > 5
        assert [address for address in loaded if urlsplit(address).netloc] == [], path.name
        # Without this class the theme's script asks for no diagrams, which it would fetch.
        assert 'class="mermaid"' not in path.read_text("utf-8")
    for path in site.rglob("*.css"):
        addresses = re.findall(r"url\(([^)]*)\)|@import\s*(\S+)", path.read_text("utf-8"))
        for address in ("".join(pair).strip("\"'") for pair in addresses):
            assert not urlsplit(address).netloc, f"{path.name}: {address}"


def test_every_file_that_a_page_names_exists(site):
    for path in pages_in(site):
        references = References(path)
        for address in references.loaded + references.linked:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc or not parts.path:
                continue
            assert (path.parent / unquote(parts.path)).is_file(), f"{path.name}: {address}"


def test_a_style_sheet_names_only_fonts_that_are_there(site):
    styles = site / "vendor" / "katex" / "katex.min.css"
    fonts = set(re.findall(r"url\(([^)]*)\)", styles.read_text("utf-8")))
    assert len(fonts) == 20
    assert fonts == {f"fonts/{path.name}" for path in (styles.parent / "fonts").iterdir()}


def test_the_repository_has_no_button_while_it_has_no_address(site, tmp_path):
    assert "md-source" not in (site / "index.html").read_text("utf-8")
    assert 'rel="edit"' not in (site / "index.html").read_text("utf-8")
    address = "https://example.org/owner/name"
    named = {"DOCS_REPOSITORY": address, "DOCS_EDIT_URI": "edit/main/docs/"}
    built = build(tmp_path / "site", "mkdocs.yml", **named)
    linked = References(built / "tutorial.html").linked
    assert address in linked
    assert f"{address}/edit/main/docs/tutorial.md" in linked


def test_versions_are_for_a_server_only(site, tmp_path):
    settings = re.compile(r'id="__config"[^>]*>(.*?)</script>')
    (alone,) = settings.findall((site / "index.html").read_text("utf-8"))
    assert '"version": null' in alone
    built = build(tmp_path / "site", "mkdocs.hosted.yml")
    (hosted,) = settings.findall((built / "index.html").read_text("utf-8"))
    assert '"provider": "mike"' in hosted
    assert "iframe-worker" in (site / "index.html").read_text("utf-8")


@pytest.mark.parametrize("name", ["tutorial", "method", "implicit-solution", "choosing-an-engine"])
def test_equations_are_rendered(site, page, name):
    page.open(site / f"{name}.html")
    assert page.run("return document.querySelectorAll('.katex-error').length") == 0
    unrendered = page.run(
        "return [...document.querySelectorAll('.arithmatex')].map(element =>"
        " element.querySelector('.katex-html') ? '' : element.innerText).filter(text => text)"
    )
    assert unrendered == []
    assert page.run("return document.querySelectorAll('.arithmatex .katex-html').length") > 8
    loaded = "return document.fonts.load('16px KaTeX_Main').then(fonts => fonts.length)"
    assert page.run(loaded) == 1
    assert page.console() == []


def test_search_finds_a_word_without_a_server(site, page):
    page.open(site / "index.html")
    page.run("document.querySelector('label[for=__search]').click()")
    page.run(
        "const field = document.querySelector('.md-search__input'); field.value = 'nystrom';"
        "field.dispatchEvent(new Event('focus')); field.dispatchEvent(new Event('keyup'))"
    )
    page.wait("return document.querySelectorAll('.md-search-result__item').length")
    links = page.run(
        "return [...document.querySelectorAll('.md-search-result__link')].map(link => link.href)"
    )
    assert any("choosing-an-engine.html" in link for link in links)
    assert page.console() == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_follow_the_system(site, page, scheme):
    page.open(site / "index.html", scheme=scheme)
    name = {"light": "default", "dark": "slate"}[scheme]
    assert page.run("return document.body.dataset.mdColorScheme") == name


@pytest.mark.parametrize("width", [390, 1280])
def test_no_page_is_wider_than_its_window(site, page, width):
    for path in pages_in(site):
        page.open(path, width=width)
        wide = page.run("return document.documentElement.scrollWidth - innerWidth")
        assert wide <= 0, f"{path.name} is {wide} pixels too wide"


def test_a_signature_is_not_cut_off(site, page):
    page.open(site / "reference" / "mlo.html", width=390)
    signatures = page.run(
        "return [...document.querySelectorAll('.doc-signature code')]"
        ".map(code => code.scrollWidth - code.clientWidth)"
    )
    assert len(signatures) > 30
    assert max(signatures) <= 1
