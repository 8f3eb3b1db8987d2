"""The page of a run, from folders made by hand."""

from __future__ import annotations

import json
import os
import re
from statistics import fmean

from made_run_folders import entry, make_folder

from lfmcw_app.output_files import leftovers
from lfmcw_app.report.page import run_page, write_report
from lfmcw_app.report.reading import read_run


def test_a_search_in_stages_shows_what_was_dropped(tmp_path):
    """A search in stages counts its rounds through, and shows what was dropped."""
    folder = make_folder(
        tmp_path / "run", {"search-1": (8, 3), "search-2": (5, 3), "search-3": (3, 3)}
    )
    html = run_page(read_run(folder))
    # Two cells of five edges lack five of eight operations.
    assert html.count('class="w gone"') == 2 * 5 * 5
    assert "round 9, search-3" in html
    assert '"stage": "search-2"' in html
    assert all(f'class="tick" x="{x}' not in html for x in ("nan", "inf"))
    assert html.count('class="boundary"') % 3 == 0
    assert html.count("<img") == 3 + 9 + 1  # weights of three classes, nine sheets, real images


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


def test_a_search_with_real_images_has_three_problems(tmp_path):
    """It says so beside the images, and under which conditions the data are."""
    folder = make_folder(
        tmp_path / "run", {"search": (8, 3)}, settings=("search.generator.name=real",)
    )
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line["losses"].pop("gan", None)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    described = json.loads((folder / "dataset.json").read_text())
    assert "data-conditions" not in run_page(read_run(folder))
    described["conditions"] = "Conditions, in the search: 5 of 10 images of <cat> are left."
    (folder / "dataset.json").write_text(json.dumps(described))
    html = run_page(read_run(folder))
    assert "Losses of the three problems" in html
    assert "Images drawn in the place of generated ones" in html
    assert "5 of 10 images of &lt;cat&gt; are left" in html


def test_random_cells_have_no_search_to_show(tmp_path):
    html = run_page(read_run(make_folder(tmp_path / "run", {}, settings=("search.method=random",))))
    assert "random cells, DARTS space, preset smoke" in html
    assert "Derived cells" in html
    assert 'id="alpha"' not in html


def test_an_evaluated_genotype_has_cells_and_training_only(tmp_path):
    html = run_page(read_run(make_folder(tmp_path / "run", {}, evaluated=True)))
    assert "Given cells" in html
    assert html.count('<svg class="cell"') == html.count('<figure class="chart">') == 2
    assert 'id="losses"' not in html
    assert "lfmcw_app.evaluate" in html


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


def test_an_unfinished_run_says_how_far_it_came(tmp_path):
    folder = make_folder(tmp_path / "run", {"search": (8, 5)}, finished=False)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"phase": "search", "round": 6, "los')  # killed while it wrote
    html = run_page(read_run(folder))
    assert "unfinished: search, round 5" in html
    assert 'data-figure="test_error"' not in html
    (folder / "metrics.jsonl").unlink()
    assert "no round yet" in run_page(read_run(folder))


def test_a_folder_whose_name_is_no_text_has_a_page(tmp_path):
    folder = make_folder(tmp_path / "run", {"search": (8, 2)})
    folder = folder.rename(os.fsdecode(bytes(tmp_path / "a") + b"\xff"))
    assert "a?" in write_report(folder).read_text("utf-8")


def test_a_page_replaces_whatever_has_its_name(tmp_path):
    """A page is written whole or not at all, and never into a pipe."""
    folder = make_folder(tmp_path / "run", {"search": (8, 2)})
    os.mkfifo(folder / "report.html")
    assert write_report(folder).is_file()


def test_a_page_leaves_nothing_of_a_writer_that_was_killed(tmp_path):
    folder = make_folder(tmp_path / "run", {"search": (8, 2)})
    (folder / ".report.17.part.html").touch()
    write_report(folder)
    assert leftovers(folder) == []


def test_cells_as_text_have_the_names_of_the_drawing(tmp_path):
    folder = make_folder(tmp_path / "run", {"search": (8, 3)})
    page = run_page(read_run(folder))
    said = page[page.index("As text") :].split("</ol>")[0]
    edges = re.findall(r"<span>(.*?) from .*?</span>", said)
    assert edges and all(f">{edge}<" in page for edge in edges)
    assert "_" not in said.replace("_blank", "")


def test_the_environment_is_closed_at_first(tmp_path):
    """It has some twenty rows, which a phone would show one below the other."""
    page = run_page(read_run(make_folder(tmp_path / "run", {"search": (8, 3)})))
    assert "<details><summary>Environment</summary>" in page
