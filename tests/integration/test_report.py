"""The report of a run: what a browser shows of it, from a real run and from folders made by
hand.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from statistics import fmean

import pytest
import typer
from browser import browser
from PIL import Image
from test_run import resume, run
from typer.testing import CliRunner

from lfmcw_app.recipe import load_recipe
from lfmcw_app.report import comparison_page, read_run, run_page
from lfmcw_app.report.__main__ import report as report_command
from lfmcw_app.search_space.genotype import random_genotype
from lfmcw_app.search_space.operations import PRIMITIVES

HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1>"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A real run."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    finished = run("--out", folder, **{"search.steps": 4})
    assert finished.returncode == 0, finished.stderr
    return folder


@pytest.fixture(scope="module")
def page():
    with browser() as opened:
        yield opened


def lines(folder, phase="search"):
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [entry for entry in entries if entry["phase"] == phase]


def report(*arguments):
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(report_command)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


# ------------------------------ folders made by hand


def alpha(nodes, width, value):
    edges = sum(2 + node for node in range(nodes))
    row = [(1 + 0.1 * value * (column == value % width)) for column in range(width)]
    return [[weight / sum(row) for weight in row] for _ in range(edges)]


def entry(phase, number, *, method="lfmcw", width=8, nodes=2):
    """A line of metrics.jsonl of a search."""
    both = {kind: alpha(nodes, width, number) for kind in ("normal", "reduction")}
    names = [list(PRIMITIVES[-width:])] * len(both["normal"])
    result = {
        "phase": phase, "round": number, "losses": {"w2": 2.0 / number, "arch": 2.5 / number},
        "metrics": {"w2": {"accuracy": 0.5}, "arch": {"accuracy": 0.25}}, "gradient_norms": {"w2": 1.0, "arch": 0.1},
        "solves": {"w2": {"engine": "cg", "iterations": 5, "residual": 0.125, "converged": number != 2}}, "alpha": both,
    }  # fmt: skip
    if number == 1:
        result["candidates"] = {"normal": names, "reduction": names}
    if method == "lfmcw":
        result["losses"] |= {"w1": 2.2 / number, "gan": {"generator": 0.7, "discriminator": 1.3}}
        result["metrics"]["w2"]["class_weights"] = [float(number), 0.5, 2.5]
    return result


def make_folder(
    path,
    stages,
    *,
    settings=(),
    names=("cat", "dog", "cow"),
    dataset="digits",
    evaluated=False,
    finished=True,
):
    """A run folder of given stages: name → (operations an edge, rounds)."""
    path.mkdir()
    recipe = load_recipe(
        "smoke",
        space="pdarts" if len(stages) > 1 else "darts",
        overrides={"dataset": dataset},
        assignments=(*settings, "search.nodes=2"),
    )
    (path / "config.yaml").write_text(recipe.to_yaml())
    (path / "dataset.json").write_text(
        json.dumps({"name": dataset, "class_names": names, "image_size": 8, "channels": 1})
    )
    method = recipe.search.method
    logged = [
        entry(stage, number, method=method, width=width)
        for stage, (width, rounds) in stages.items()
        for number in range(1, rounds + 1)
    ]
    (path / "samples").mkdir()
    Image.new("L", (16, 24), 200).save(path / "samples" / "real.png")
    for one in logged if method == "lfmcw" else []:
        Image.new("L", (16, 24), 100).save(
            path / "samples" / f"{one['phase']}-{one['round']:06d}.png"
        )
    genotype = random_genotype(2, 0)
    if finished:
        logged += [
            {
                "phase": "training",
                "round": n,
                "losses": {"network": 1 / n},
                "metrics": {"network": {"accuracy": 0.5}},
            }
            for n in range(1, 4)
        ]
        found = {
            "test_error_percent": 12.5,
            "test_top5_error_percent": None,
            "parameters": 1234,
            "test_images": 8,
            "multiply_adds_millions": 1.5,
            "seed": 0,
            "genotype": genotype.to_data(),
            "dataset": dataset,
        }
        (path / "result.json").write_text(json.dumps(found))
        (path / ("evaluated.json" if evaluated else "genotype.json")).write_text(genotype.to_json())
    (path / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in logged))
    return path


# ------------------------------ in a browser


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_shows_the_runs_figures_at_every_width_and_in_both_schemes(
    whole, page, width, scheme
):
    page.open(whole / "report.html", width=width, scheme=scheme)
    result, search = json.loads((whole / "result.json").read_text()), lines(whole)
    assert page.text("[data-figure=test_error] b") == f"{result['test_error_percent']:.2f}"
    assert page.text("[data-figure=parameters] b") == f"{result['parameters']:,}"
    shown = page.run(
        "return Object.fromEntries([...document.querySelectorAll('.chart')].map(c => "
        "[c.querySelector('figcaption').innerText,Object.fromEntries([...c.querySelectorAll('li')].map(l => [l.dataset.label, Number(l.dataset.value)]))]))"
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
    weights = last["metrics"]["w2"][
        "class_weights"
    ]  # of four rounds the last tenth is the last one
    assert page.texts(".heat .last li") == [f"{weight:.2f}" for weight in weights]
    assert page.run(
        "return [...document.querySelectorAll('svg.cell')].map(c => c.dataset.edges)"
    ) == ["2", "2"]
    assert len(page.texts(".sheets figure")) == 5
    pictures = page.run("return [...document.images].map(i => i.naturalWidth)")
    assert pictures
    assert all(pictures)
    assert page.run("return document.documentElement.scrollWidth <= innerWidth")
    assert page.console() == []


def test_light_and_dark_are_readable(whole, page):
    luminances = {}
    for scheme in ("light", "dark"):
        page.open(whole / "report.html", scheme=scheme)
        luminances[scheme] = page.run(
            """const canvas = document.createElement("canvas")
              .getContext("2d", {willReadFrequently: true});
            const luminance = colour => {
              canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
              const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map(v => v / 255)
                .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
              return 0.2126 * r + 0.7152 * g + 0.0722 * b;
            };
            const style = getComputedStyle(document.documentElement);
            const read = name => luminance(style.getPropertyValue(name).trim());
            const names = [...document.styleSheets[0].cssRules].filter(r => r.selectorText === ":root")
              .flatMap(r => [...r.style]).filter(n => /^--(text|muted|accent|series-|op-)/.test(n));
            return {card: read("--card"), inks: Object.fromEntries(names.map(n => [n, read(n)]))};"""
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
    assert page.texts(".alpha[data-kind=normal] g text")[:8] != [
        f"{100 * weight:.1f}" for weight in first
    ]
    page.run(
        "const s = document.querySelector('.slider input'); s.value = 0; s.dispatchEvent(new "
        "Event('input'))"
    )
    assert page.text("[data-frame]") == "round 1"
    assert [
        float(text) for text in page.texts(".alpha[data-kind=normal] g text")[:8]
    ] == pytest.approx([100 * weight for weight in first], abs=0.1)
    assert page.console() == []


def test_the_pointer_reads_values_off_a_chart(whole, page):
    page.open(whole / "report.html")
    page.run(
        """const svg = [...document.querySelectorAll(".chart svg")].find(s =>
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
        assert page.text(".heat .names li").startswith("</script>") or HOSTILE.startswith(
            page.text(".heat .names li")[:8]
        )
        assert page.run("return document.querySelector('.names li').title") == HOSTILE
        assert page.console() == []


def test_runs_are_laid_side_by_side(whole, page, tmp_path):
    other = make_folder(tmp_path / "other", {"search": (8, 4)}, settings=("search.lambda=2",))
    finished = report("--compare", whole, other, "--out", tmp_path / "both.html")
    assert finished.exit_code == 0, finished.stderr
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


# ------------------------------ what is in the page


def test_the_page_refers_to_nothing_outside_itself(whole):
    html = (whole / "report.html").read_text("utf-8")
    assert len(html) < 300_000
    references = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"'\s>)]*)""", html)
    assert references
    assert all(reference.startswith(("data:", "#")) for reference in references)


def test_a_search_in_stages_counts_its_rounds_through_and_shows_what_was_dropped(tmp_path):
    folder = make_folder(
        tmp_path / "run", {"search-1": (8, 3), "search-2": (5, 3), "search-3": (3, 3)}
    )
    html = run_page(read_run(folder))
    assert (
        html.count('class="w gone"') == 2 * 5 * 5
    )  # two cells of five edges without five of eight operations
    assert "round 9, search-3" in html
    assert '"stage": "search-2"' in html
    assert all(f'class="tick" x="{x}' not in html for x in ("nan", "inf"))
    assert html.count('class="boundary"') % 3 == 0
    assert html.count("<img") == 1 + 9 + 1  # the heat map, nine sheets, real images


def test_a_search_without_a_generator_has_two_problems(tmp_path):
    html = run_page(
        read_run(
            make_folder(tmp_path / "run", {"search": (8, 3)}, settings=("search.method=darts",))
        )
    )
    assert "Losses of the two problems" in html
    assert 'id="weights"' not in html
    assert 'id="images"' not in html
    assert "W1: loss" not in html


def test_random_cells_have_no_search_to_show(tmp_path):
    html = run_page(read_run(make_folder(tmp_path / "run", {}, settings=("search.method=random",))))
    assert "random cells, DARTS space, preset smoke" in html
    assert "Derived cells" in html
    assert 'id="alpha"' not in html


def test_an_evaluated_genotype_has_cells_and_training_only(tmp_path):
    html = run_page(read_run(make_folder(tmp_path / "run", {}, evaluated=True)))
    assert "Given cells" in html
    assert html.count("<svg") == 2 + 2
    assert 'id="losses"' not in html
    assert "lfmcw_app.evaluate" in html


def test_the_parts_of_the_architectures_gradient_are_drawn_where_they_were_recorded(tmp_path):
    folder = make_folder(tmp_path / "run", {"search": (8, 3)})
    assert "Parts of A" not in run_page(read_run(folder))
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    entries[1]["gradient_terms"] = {
        "direct": {"norm": 0.5, "cosine": 0.9},
        "gan_w2": {"norm": 0.25, "cosine": -0.1},
    }
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in entries))
    html = run_page(read_run(folder))
    assert 'data-label="direct" data-value="0.5"' in html
    assert 'data-label="through G → W2" data-value="-0.1"' in html


def test_solves_that_did_not_converge_are_counted(tmp_path):
    html = run_page(read_run(make_folder(tmp_path / "run", {"search": (8, 4)})))
    row = re.search(r'<tr data-solve="w2">(.*?)</tr>', html)[1]
    assert re.findall(r">([^<]+)</td>", row) == ["w2", "cg", "4", "5.0", "0.125", "0.125", "1"]


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
    assert re.findall(r">([^<]+)</td>", row)[2] == "4"


def test_many_rounds_and_classes_stay_a_small_page(tmp_path):
    folder = make_folder(
        tmp_path / "run", {"search": (8, 2)}, names=[f"class {index}" for index in range(100)]
    )
    base = entry("search", 2)
    with (folder / "metrics.jsonl").open("w") as file:
        for number in range(1, 3001):
            base["round"], base["losses"]["w1"] = number, 2.0 + (number % 7)
            base["metrics"]["w2"]["class_weights"] = [1.0 + (number * c % 13) for c in range(100)]
            file.write(json.dumps(base) + "\n")
    html = run_page(read_run(folder))
    assert len(html) < 500_000
    assert "The 30 heaviest of 100 classes." in html
    assert "thick: mean of 120" in html
    mean = fmean(2.0 + (number % 7) for number in range(2881, 3001))
    assert f'data-label="W1" data-value="{mean:.6g}"' in html


# ------------------------------ unfinished, damaged, repeated


def test_an_unfinished_run_says_how_far_it_came(tmp_path):
    folder = make_folder(tmp_path / "run", {"search": (8, 5)}, finished=False)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"phase": "search", "round": 6, "los')  # killed while it wrote
    html = run_page(read_run(folder))
    assert "unfinished: search, round 5" in html
    assert 'data-figure="test_error"' not in html
    (folder / "metrics.jsonl").unlink()
    assert "no round yet" in run_page(read_run(folder))


def test_a_run_of_before_reports_is_shown_without_what_it_lacks(whole, tmp_path):
    folder = tmp_path / "old"
    shutil.copytree(
        whole,
        folder,
        ignore=shutil.ignore_patterns("samples", "timings.jsonl", "dataset.json", "report.html"),
    )
    html = run_page(read_run(folder))
    assert 'id="costs"' not in html
    assert 'id="images"' not in html
    assert '<li title="9">9</li>' in html


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("metrics.jsonl", '{"phase": "search"}\n', "line 1 lacks"),
        ("metrics.jsonl", "nonsense\n", "line 1 is not JSON"),
        ("result.json", "[1]", "holds a list"),
        ("timings.jsonl", "{}\n", "line 1 lacks"),
        ("genotype.json", "{}", "genotype"),
        ("config.yaml", "search: [", "not valid YAML"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, text, words):
    folder = make_folder(tmp_path / "run", {"search": (8, 2)})
    (folder / name).write_text(text)
    finished = report(folder)
    assert finished.exit_code == 2
    assert words in " ".join(finished.stderr.split())


def test_a_folder_without_a_run_is_refused(tmp_path):
    finished = report(tmp_path)
    assert finished.exit_code == 2
    assert "There is no run in" in finished.stderr
    assert "needs two run folders" in report("--compare", tmp_path).stderr


@pytest.mark.slow
def test_the_command_in_the_report_repeats_the_run(whole, tmp_path):
    html = (whole / "report.html").read_text("utf-8")
    command = shlex.split(re.search(r"<pre data-command>(.*?)</pre>", html)[1])
    assert command[0] == "python"
    again = [sys.executable, *command[1:], "--threads=1", "--out", str(tmp_path / "again")]
    finished = subprocess.run(again, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    for name in ("metrics.jsonl", "result.json", "config.yaml"):
        assert (tmp_path / "again" / name).read_bytes() == (whole / name).read_bytes()


def test_a_report_can_be_written_again_after_resuming(whole):
    (whole / "report.html").unlink()
    assert resume(whole).returncode == 0
    assert (whole / "report.html").exists()
