"""The report of a run: what a browser shows of it, from a real run and from folders made by
hand.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from dataclasses import replace

import pytest
from browser import browser
from command_calls import call
from made_run_folders import add_classes, make_folder
from started_processes import finished as finished_process
from tiny_runs import arguments, resume, run

from lfmcw_app.commands.report import report as report_command
from lfmcw_app.report.page import comparison_page, run_page
from lfmcw_app.report.reading import read_run
from lfmcw_app.search_space.genotype import random_genotype
from lfmcw_app.search_space.nasbench201 import OPERATIONS, SumCell

HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1>"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A real run."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    finished = run("--out", folder, **{"search.primitives": None})
    assert finished.returncode == 0, finished.stderr
    return folder


@pytest.fixture(scope="module")
def page():
    with browser() as opened:
        yield opened


def lines(folder, phase="search"):
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [entry for entry in entries if entry["phase"] == phase]


def report(*given):
    return call(report_command, *given)


# ------------------------------ in a browser


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_shows_the_runs_figures(whole, page, width, scheme):
    """The page shows the run's figures at every width and in both schemes."""
    page.open(whole / "report.html", width=width, scheme=scheme)
    result, search = json.loads((whole / "result.json").read_text()), lines(whole)
    assert page.text("[data-figure=test_error] b") == f"{result['test_error_percent']:.2f}"
    assert page.text("[data-figure=parameters] b") == f"{result['parameters']:,}"
    shown = page.run(
        """const values = chart => Object.fromEntries([...chart.querySelectorAll('li')]
             .map(l => [l.dataset.label, Number(l.dataset.value)]));
           return Object.fromEntries([...document.querySelectorAll('.chart')]
             .map(c => [c.querySelector('figcaption').innerText, values(c)]))"""
    )
    last = search[-1]
    assert shown["W1: loss on training data"]["W1"] == pytest.approx(last["losses"]["w1"], rel=1e-5)
    assert shown["GAN: losses of the players"]["generator"] == pytest.approx(
        last["losses"]["gan"]["generator"], rel=1e-5
    )
    assert shown["W2: loss with weighted classes"]["total"] == pytest.approx(
        last["losses"]["w2"], rel=1e-5
    )
    assert shown["A: loss on validation data"]["A"] == pytest.approx(
        last["losses"]["arch"], rel=1e-5
    )
    error = 100 * (1 - last["metrics"]["arch"]["accuracy"])
    assert shown["Error on batches %"]["W2, validation"] == pytest.approx(error, rel=1e-5)
    weights = last["metrics"]["w2"]["class_weights"]  # the last tenth of four rounds is the last
    assert page.texts(".heat tbody td.n") == [f"{weight:.2f}" for weight in weights]
    assert page.run(
        "return [...document.querySelectorAll('svg.cell')].map(c => c.dataset.edges)"
    ) == ["2", "2"]
    assert len(page.texts(".sheets figure")) == 5
    pictures = page.run("return [...document.images].map(i => i.naturalWidth)")
    assert pictures
    assert all(pictures)
    assert page.run("return document.documentElement.scrollWidth <= innerWidth")
    assert page.console() == []


@pytest.mark.parametrize("width", [1280, 390])
def test_errors_by_class_are_seen(page, tmp_path, width):
    """With names that are long, hostile, or not Latin; few classes in numbers, many as a list."""
    names = (HOSTILE, "häßliche 猫 " * 20, "$10_$20")
    confusion = [[7, 3, 0], [0, 10, 0], [1, 0, 9]]
    few = make_folder(tmp_path / "few", {"search": (8, 4)}, names=names)
    add_classes(few, [30.0, 0.0, 10.0], confusion=confusion, doubt="Why?")
    many = make_folder(tmp_path / "many", {"search": (8, 4)}, names=[f"{k}" for k in range(120)])
    add_classes(many, [float(k) / 2 for k in range(120)], mistakes=[[3, 7, 5], [4, 0, 1]])
    for folder in (few, many):
        (folder / "report.html").write_text(run_page(read_run(folder)), "utf-8")
        page.open(folder / "report.html", width=width)
        assert page.run("return document.documentElement.scrollWidth <= innerWidth")
        assert page.run("return window.hacked === undefined")
        if folder == few:
            assert page.text("[data-doubt]") == "Why?"
            assert page.texts("table.confusion td") == [
                "7",
                "3",
                "0",
                "0",
                "10",
                "0",
                "1",
                "0",
                "9",
            ]
            assert page.texts("tr[data-class-error] td:nth-child(3)") == ["30.0", "10.0", "0.0"]
        else:
            assert page.texts("tr[data-mistake] > *") == [
                "3",
                "7",
                "5",
                "50.0",
                "4",
                "0",
                "1",
                "10.0",
            ]
        assert page.text("[data-figure=training_error] b") == "1.25"
        assert page.console() == []


@pytest.mark.parametrize("width", [1280, 800, 390])
def test_texts_of_charts_have_one_size(whole, page, width):
    """As they are seen, whatever a chart's width: of axes, legends, notes and α's weights."""
    page.open(whole / "report.html", width=width)
    sizes = page.run(
        """const seen = new Set();
           for (const text of document.querySelectorAll(
               '.chart text, .legend, .chart .note, .alpha td, .alpha th, .heat td, .scale')) {
             const size = parseFloat(getComputedStyle(text).fontSize);
             const matrix = text.getScreenCTM ? text.getScreenCTM() : {a: 1, d: 1};
             seen.add((size * matrix.a).toFixed(2)); seen.add((size * matrix.d).toFixed(2));
           }
           return [...seen]"""
    )
    assert len(sizes) == 1
    widths = page.run(
        "return [...document.querySelectorAll('.chart > svg')].map(c => Math.round(c.clientWidth))"
    )
    assert width == 390 or len(set(widths)) > 1  # of different charts


def test_no_row_of_a_wide_page_is_half_empty(whole, page):
    """Nowhere does a part of the page have 200 pixels of height with nothing in its right third."""
    page.open(whole / "report.html", width=1280)
    short = page.run(
        """const found = [];
           for (const part of document.querySelectorAll('section')) {
             const own = part.getBoundingClientRect();
             const boxes = [...part.querySelectorAll('td, th, img, svg, li, p, pre, figcaption')]
               .map(e => e.getBoundingClientRect())
               .filter(b => b.right > own.left + 0.66 * own.width);
             let empty = 0;
             for (let y = own.top + 20; y < own.bottom - 20; y += 5) {
               empty = boxes.some(b => b.top <= y && y <= b.bottom) ? 0 : empty + 5;
               if (empty === 200) found.push(`${part.id} at ${Math.round(y - own.top)}`);
             }
           }
           return found"""
    )
    assert short == []


def test_light_and_dark_are_readable(whole, page):
    luminances = {}
    for scheme in ("light", "dark"):
        page.open(whole / "report.html", scheme=scheme)
        luminances[scheme] = page.run(
            """const canvas = document.createElement("canvas")
              .getContext("2d", {willReadFrequently: true});
            const luminance = colour => {
              canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
              const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3)
                .map(v => v / 255)
                .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
              return 0.2126 * r + 0.7152 * g + 0.0722 * b;
            };
            const style = getComputedStyle(document.documentElement);
            const read = name => luminance(style.getPropertyValue(name).trim());
            const names = [...document.styleSheets[0].cssRules]
              .filter(r => r.selectorText === ":root")
              .flatMap(r => [...r.style]).filter(n => /^--(text|muted|accent|series-|op-)/.test(n));
            const inks = Object.fromEntries(names.map(n => [n, read(n)]));
            return {card: read("--card"), inks};"""
        )
    assert luminances["light"]["card"] > 0.9
    assert luminances["dark"]["card"] < 0.1
    for found in luminances.values():
        assert len(found["inks"]) > 15
        for name, ink in found["inks"].items():
            high, low = max(ink, found["card"]), min(ink, found["card"])
            # WCAG: text 4.5, lines of a chart 3; the grey of `none`, which no derived cell has, is
            # held back.
            least = (
                4.5
                if name in ("--text", "--muted", "--accent")
                else 2.5
                if name == "--op-none"
                else 3.0
            )
            assert (high + 0.05) / (low + 0.05) >= least, name


def test_the_slider_goes_through_alpha(whole, page):
    page.open(whole / "report.html")
    recorded = [one for one in lines(whole) if "alpha" in one]
    assert page.text("[data-frame]") == f"round {recorded[-1]['round']}"
    first = recorded[0]["alpha"]["normal"][0]
    assert page.texts(".alpha[data-kind=normal] td")[:8] != [
        f"{100 * weight:.1f}" for weight in first
    ]
    page.run(
        "const s = document.querySelector('.slider input'); s.value = 0; s.dispatchEvent(new "
        "Event('input'))"
    )
    assert page.text("[data-frame]") == "round 1"
    assert [float(text) for text in page.texts(".alpha[data-kind=normal] td")[:8]] == pytest.approx(
        [100 * weight for weight in first], abs=0.1
    )
    assert page.console() == []


def test_the_pointer_reads_values_off_a_chart(whole, page):
    page.open(whole / "report.html")
    page.run(
        """const svg = [...document.querySelectorAll(".chart > svg")].find(s =>
        s.getAttribute("aria-label").startsWith("W1")); const box = svg.getBoundingClientRect();
        svg.dispatchEvent(new PointerEvent("pointermove", {clientX: box.right - 1, clientY: box.top
        + 20}));"""
    )
    label, value = page.text("#tip").split("\n")
    assert label == "round 4"
    assert float(value.split()[-1]) == pytest.approx(lines(whole)[-1]["losses"]["w1"], rel=0.01)
    assert page.console() == []


def test_without_scripts_everything_but_the_slider_is_there(whole, page):
    page.open(whole / "report.html", scripts=False)
    assert not page.shown(".slider")
    assert page.shown(".alpha[data-kind=normal]")
    assert page.shown(".chart polyline.mean")
    assert page.shown("svg.cell")
    assert page.text("[data-figure=test_error] b")


def test_what_comes_from_the_run_cannot_become_part_of_the_page(page, tmp_path):
    folder = make_folder(
        tmp_path / "x<b>y",
        {"search": (8, 3)},
        names=(HOSTILE, "dog", "cow"),
        dataset=f"folder:{HOSTILE}",
    )
    (folder / "environment.json").write_text(json.dumps({"command": HOSTILE, "platform": HOSTILE}))
    target, other = tmp_path / "report.html", tmp_path / "comparison.html"
    target.write_text(run_page(read_run(folder)), "utf-8")
    other.write_text(comparison_page([read_run(folder), read_run(folder)]), "utf-8")
    for path in (target, other):
        page.open(path)
        assert page.run("return window.hacked === undefined")
        assert page.run("return document.querySelector('.heat .classname').textContent") == HOSTILE
        assert page.console() == []


def test_runs_are_laid_side_by_side(whole, page, tmp_path):
    other = make_folder(tmp_path / "other", {"search": (8, 4)}, settings=("search.lambda=2",))
    finished = report("--compare", whole, other, "--out", tmp_path / "both.html")
    assert finished.returncode == 0, finished.stderr
    for width in (1280, 390):
        page.open(tmp_path / "both.html", width=width)
        assert page.texts("#results thead th")[1:] == ["whole", "other"]
        error = json.loads((whole / "result.json").read_text())["test_error_percent"]
        assert page.texts("tr[data-figure=test_error] b") == [f"{error:.2f}", "12.50"]
        assert page.texts("tr[data-setting='search.lambda'] td") == ["1.0", "2.0"]
        labels = page.run(
            "return [...document.querySelectorAll('.chart')].map(c => "
            "[...c.querySelectorAll('li')].length)"
        )
        assert set(labels) == {2}
        assert page.run("return document.documentElement.scrollWidth <= innerWidth")
        assert page.console() == []


LONG = (
    "Rhododendron ferrugineum subsp. alpinum with an exceptionally long descriptive suffix",
    "pneumonoultramicroscopicsilicovolcanoconiosis_and_more_without_any_space_at_all",
    "狸猫（たぬき）と柴犬の見分けにくい長い長い名前のクラスその一",
)


@pytest.mark.parametrize("width", [1280, 390])
def test_long_names_are_seen_whole(page, tmp_path, width):
    """In every table, beside every image and in the sentences at the head."""
    folder = make_folder(tmp_path / "run", {"search": (8, 4)}, names=LONG)
    confusion = [[7, 3, 0], [0, 10, 0], [1, 0, 9]]
    add_classes(folder, [30.0, 0.0, 10.0], confusion=confusion)
    (folder / "search.json").write_text(json.dumps({"w1_confusion": confusion}))
    (folder / "report.html").write_text(run_page(read_run(folder)), "utf-8")
    page.open(folder / "report.html", width=width)
    assert LONG[0] in page.text("[data-summary]")
    cut = """const shown = [...document.querySelectorAll('.classname, .turned, .sheets .names li')];
        return [shown.length, shown.filter(e => e.scrollWidth > e.clientWidth + 1 ||
          e.scrollHeight > e.clientHeight + 1 ||
          getComputedStyle(e).textOverflow === 'ellipsis').map(e => e.textContent)]"""
    count, found = page.run(cut)
    assert count > 20
    assert found == []
    # Each row of the strips and of the images stands beside its name.
    assert page.run(
        """return [...document.querySelectorAll('.heat tbody tr')].every(row => {
             const name = row.querySelector('th').getBoundingClientRect();
             const strip = row.querySelector('img').getBoundingClientRect();
             return Math.abs(name.top - strip.top) < 2 && Math.abs(name.bottom - strip.bottom) < 2;
           })"""
    )
    assert page.run(
        """const names = [...document.querySelectorAll('.sheets .names li')];
           const image = document.querySelector('.sheets img').getBoundingClientRect();
           return names.every((name, row) => Math.abs(name.getBoundingClientRect().top
             - image.top - row * image.height / names.length) < 2)"""
    )
    assert page.run("return document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize(
    "cells",
    [random_genotype(2, 0), random_genotype(6, 1), SumCell((*OPERATIONS[1:], *OPERATIONS[3:]))],
    ids=["2-nodes", "6-nodes", "nasbench201"],
)
def test_labels_of_cells_fit_their_boxes(page, tmp_path, cells):
    """Their texts, as the browser sets them, are inside of the boxes that no line meets."""
    path = tmp_path / "cells.html"
    folder = make_folder(tmp_path / "run", {"search": (8, 2)})
    run = replace(read_run(folder), genotype=cells)
    path.write_text(run_page(run), "utf-8")
    page.open(path, width=390)
    page.run("document.querySelectorAll('svg.cell').forEach(s => s.scrollIntoView())")
    outside = page.run(
        """const found = [];
           for (const text of document.querySelectorAll('svg.cell text')) {
             const box = text.previousElementSibling.getBBox(), own = text.getBBox();
             if (own.x < box.x || own.x + own.width > box.x + box.width || own.y < box.y
               || own.y + own.height > box.y + box.height) found.push(text.textContent);
           }
           return [document.querySelectorAll('svg.cell text').length, found]"""
    )
    assert outside[0] > 6
    assert outside[1] == []


def test_all_columns_of_a_comparison_are_reached_on_a_phone(page, tmp_path):
    """The table scrolls by itself, with the keyboard too, and its first column stays."""
    folders = [make_folder(tmp_path / f"run-{k}", {"search": (8, 2 + k)}) for k in range(5)]
    (tmp_path / "all.html").write_text(comparison_page([read_run(f) for f in folders]), "utf-8")
    page.open(tmp_path / "all.html", width=390)
    assert page.run("return document.documentElement.scrollWidth <= innerWidth")
    places = """const table = document.querySelector('#results .scroll');
        table.scrollLeft = arguments[0];
        const heads = [...table.querySelectorAll('thead th')].map(h => h.getBoundingClientRect());
        return [heads[0].left, heads.at(-1).right, table.getBoundingClientRect().right,
                table.tabIndex, table.getAttribute('aria-label')]"""
    first, last, edge, tab, name = page.run(places, 0)
    assert last > edge
    assert (tab, name) == (0, "Results")
    kept, last, edge, _, _ = page.run(places, 10_000)
    assert last <= edge + 1
    assert kept == first


def test_a_chart_is_read_with_the_keyboard(whole, page):
    page.open(whole / "report.html")
    press = """const svg = document.querySelector('.chart svg[aria-label^="W1"]'); svg.focus();
        for (const key of arguments[0])
          svg.dispatchEvent(new KeyboardEvent('keydown', {key, bubbles: true}));"""
    page.run(press, ["ArrowLeft"])
    assert page.text("#tip").split("\n")[0] == "round 4"
    page.run(press, ["ArrowLeft"])
    label, value = page.text("#tip").split("\n")
    assert label == "round 3"
    assert float(value.split()[-1]) == pytest.approx(lines(whole)[2]["losses"]["w1"], rel=0.01)
    page.run(press, ["Escape"])
    assert not page.shown("#tip")
    assert page.console() == []


def test_tables_and_figures_have_names_for_screen_readers(whole, page):
    other = whole.parent / "both.html"
    other.write_text(comparison_page([read_run(whole), read_run(whole)]), "utf-8")
    for path in (whole / "report.html", other):
        page.open(path)
        missing = page.run(
            """return [...[...document.querySelectorAll('.scroll th, .heat th')]
                 .filter(h => !h.scope),
               ...[...document.querySelectorAll('svg[role=img], .scroll, .sheets, nav')]
                 .filter(e => !e.getAttribute('aria-label')),
               ...[...document.images].filter(i => !i.alt)].map(e => e.outerHTML.slice(0, 80))"""
        )
        assert missing == []


# ------------------------------ what is in the page


def test_the_page_refers_to_nothing_outside_itself(whole):
    html = (whole / "report.html").read_text("utf-8")
    assert len(html) < 300_000
    references = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"'\s>)]*)""", html)
    assert references
    assert all(reference.startswith(("data:", "#")) for reference in references)


def test_time_and_memory_are_added_up_by_problem(whole):
    logged = [json.loads(line) for line in (whole / "timings.jsonl").read_text().splitlines()]
    searched = [one for one in logged if one["phase"] == "search"]
    assert [one["rounds"] for one in searched] == [[1, 2], [3, 4]]
    for one in searched:
        assert set(one["problems"]) == {"w1", "gan", "w2", "arch"}
        assert 0 < sum(problem["seconds"] for problem in one["problems"].values()) <= one["seconds"]
        assert all(problem["updates"] == 2 for problem in one["problems"].values())
        assert one["problems"]["gan"]["held_bytes"] > one["problems"]["arch"]["held_bytes"] > 0
    html = (whole / "report.html").read_text("utf-8")
    assert len(re.findall(r'<tr data-cost="search ', html)) == 4
    row = re.search(r'<tr data-cost="search arch">(.*?)</tr>', html)[1]
    assert re.findall(r">([^<]+)</td>", row)[0] == "4"
    assert searched[0]["beside"] == {} and set(searched[1]["beside"]) == {"measuring the generator"}
    others = re.findall(r'<tr data-other-cost="search"><th scope="row">([^<]+)</th>', html)
    assert others == ["search: measuring the generator", "search: data, logging and checkpoints"]


# ------------------------------ unfinished, damaged, repeated


def test_a_run_of_before_reports_is_shown_without_what_it_lacks(whole, tmp_path):
    folder = tmp_path / "old"
    shutil.copytree(
        whole,
        folder,
        ignore=shutil.ignore_patterns("samples", "timings.jsonl", "dataset.json", "report.html"),
    )
    (folder / "search.json").unlink()
    metrics = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    for line in lines:
        line.pop("quality", None)
    metrics.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    html = run_page(read_run(folder))
    assert 'id="costs"' not in html
    assert 'id="images"' not in html
    assert '<tr data-class="9">' in html


def test_a_damaged_recipe_is_named(tmp_path):
    folder = make_folder(tmp_path / "run", {"search": (8, 2)})
    (folder / "config.yaml").write_text("search: [")
    finished = report(folder)
    assert finished.returncode == 2
    assert "not valid YAML" in " ".join(finished.stderr.split())


@pytest.mark.parametrize("name", ["metrics.jsonl", "result.json", "timings.jsonl", "genotype.json"])
def test_a_report_without_a_damaged_file_names_it(tmp_path, name):
    folder = make_folder(tmp_path / "run", {"search": (8, 2)})
    (folder / name).write_text("{}\n" if name.endswith("l") else "[1]")
    assert report(folder).returncode == 0
    html = (folder / "report.html").read_text("utf-8")
    assert "Not shown, since it is damaged:" in html
    assert name in html
    other = make_folder(tmp_path / "other", {"search": (8, 2)})
    out = tmp_path / "both.html"
    assert report("--compare", folder, other, "--out", out).returncode == 0
    assert re.search(rf"<li>run: [^<]*{name}", out.read_text("utf-8"))


def test_a_folder_without_a_run_is_refused(tmp_path):
    finished = report(tmp_path)
    assert finished.returncode == 2
    assert "There is no run in" in finished.stderr
    assert "needs two run folders" in report("--compare", tmp_path).stderr


@pytest.mark.slow
def test_the_command_in_the_report_repeats_the_run(tmp_path):
    """In a process of its own, as the command names its program."""
    first, again = tmp_path / "first", tmp_path / "again"
    program = [sys.executable, "-m", "lfmcw_app.run"]
    finished = finished_process([*program, *arguments("--method=darts", "--out", first)])
    assert finished.returncode == 0, finished.stderr
    html = (first / "report.html").read_text("utf-8")
    command = shlex.split(re.search(r"<pre data-command>(.*?)</pre>", html)[1])
    assert command[0] == "python"
    finished = finished_process([sys.executable, *command[1:], "--threads=1", "--out", again])
    assert finished.returncode == 0, finished.stderr
    for name in ("metrics.jsonl", "result.json", "config.yaml"):
        assert (again / name).read_bytes() == (first / name).read_bytes()


def test_a_report_can_be_written_again_after_resuming(whole):
    (whole / "report.html").unlink()
    assert resume(whole).returncode == 0
    assert (whole / "report.html").exists()
