"""Runs whose test error is looked up: their result, and what is refused before they start."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace

import pytest
from made_cell_tables import (
    made_error,
    rows_of,
    write_csv,
    write_nats_file,
    write_nats_folder,
    write_small_nats_file,
)
from rich.console import Console
from typer.testing import CliRunner

from lfmcw_app import lookup
from lfmcw_app.cell_table_file import CellTableFile
from lfmcw_app.classifier import network_path
from lfmcw_app.commands.execution import reported_errors
from lfmcw_app.commands.resumption import resumed_folder
from lfmcw_app.complete_runs import look_up_genotype
from lfmcw_app.errors import DataWarning, InputError
from lfmcw_app.lookup import look_up, open_table, table_of
from lfmcw_app.recipe_loading import load_recipe, parsed_settings
from lfmcw_app.report.page import write_report
from lfmcw_app.resolving import resolve_recipe
from lfmcw_app.result import print_result
from lfmcw_app.run_files import EVALUATED
from lfmcw_app.run_folder import RunFolder
from lfmcw_app.search_space.nasbench201 import SumCell, all_cells
from lfmcw_app.stages import phases_of

CELL = SumCell(("nor_conv_3x3", "none", "nor_conv_3x3"))
BEST = "|nor_conv_3x3~0|+|nor_conv_3x3~0|nor_conv_3x3~1|"


@pytest.fixture(scope="module")
def table_file(tmp_path_factory):
    return write_csv(tmp_path_factory.mktemp("tables") / "cells.csv")


def recipe_of(file, *settings, dataset="digits", nodes=3, **more):
    given = {"search.nodes": nodes, "lookup.file": str(file), **parsed_settings(settings)}
    return resolve_recipe(dataset, "smoke", None, given, 0, space="nasbench201", **more)


# ------------------------------ the table of a recipe


def test_a_recipe_records_the_table_and_its_digest(table_file):
    recipe = recipe_of(table_file)
    assert recipe.lookup.file == str(table_file)
    assert len(recipe.lookup.digest) == 64
    assert not recipe.trains
    assert phases_of(recipe) == ("search",)
    assert phases_of(recipe_of(table_file, "search.method=random")) == ()
    assert table_of(recipe).complete
    assert table_of(load_recipe("smoke")) is None


def test_a_table_that_has_changed_is_refused(tmp_path):
    file = write_csv(tmp_path / "cells.csv")
    recipe = recipe_of(file)
    file.write_text(file.read_text().replace("60.0", "61.0"))
    with pytest.raises(InputError, match=r"is not the table of the recipe: lookup\.digest is"):
        table_of(recipe)
    assert table_of(recipe_of(file)).cells["|none~0|+|none~0|none~1|"].errors[0] == 61.0


def test_a_table_elsewhere_has_the_same_digest(table_file, tmp_path):
    moved = tmp_path / "moved.csv"
    shutil.copy(table_file, moved)
    assert recipe_of(moved).lookup.digest == recipe_of(table_file).lookup.digest


def test_the_digest_of_a_folder_is_that_of_its_files(tmp_path):
    folder = write_nats_folder(tmp_path)
    first = recipe_of(folder, dataset="cifar10", nodes=4).lookup.digest
    (folder / "000002.pickle.pbz2").rename(folder / "000003.pickle.pbz2")
    assert recipe_of(folder, dataset="cifar10", nodes=4).lookup.digest != first


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"nodes": 4}, r"nasbench201 with 3 nodes, but the recipe is for nasbench201 with 4"),
        ({"dataset": "fashion-mnist"}, r"errors on digits, but none on 'fashion-mnist'"),
        ({"space": "darts"}, r"nasbench201 with 3 nodes, but the recipe is for darts"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(table_file, settings, words):
    chosen = {"space": "nasbench201", "dataset": "digits", "nodes": 3, **settings}
    recipe = load_recipe(
        "smoke",
        space=chosen["space"],
        overrides={
            "dataset": chosen["dataset"],
            "search.nodes": chosen["nodes"],
            "lookup.file": str(table_file),
        },
    )
    with pytest.raises(InputError, match=words):
        table_of(recipe)


def with_errors(path, change):
    """A table with other errors."""
    cells = list(all_cells(3))
    file = CellTableFile.open(
        path, space="nasbench201", nodes=3, cells=len(cells), seeds=2, dataset="digits", about={}
    )
    rows = rows_of(cells, 2)
    file.append(*(replace(row, test_error_percent=change(row.test_error_percent)) for row in rows))
    return path


def test_a_table_of_fractions_is_refused(tmp_path):
    recipe = recipe_of(with_errors(tmp_path / "cells.csv", lambda error: error / 100))
    with pytest.raises(InputError, match=r"no error above 0\.60.*Multiply its errors by 100"):
        table_of(recipe)


def test_a_table_of_accuracies_is_doubted(tmp_path):
    recipe = recipe_of(with_errors(tmp_path / "cells.csv", lambda error: 100 - error))
    with pytest.warns(DataWarning, match=r"can only guess, has an error of 39.*100 minus"):
        table_of(recipe)


def test_a_data_set_may_have_another_name_in_the_table(table_file):
    recipe = recipe_of(table_file, "lookup.dataset=digits", dataset="random:cifar10")
    assert table_of(recipe).dataset == "digits"
    with pytest.raises(InputError, match="errors on digits, but none on 'random:cifar10'"):
        table_of(recipe_of(table_file, dataset="random:cifar10"))


def test_a_table_that_is_not_complete_is_refused(tmp_path):
    file = write_csv(tmp_path / "cells.csv", leave_out=1)
    with pytest.raises(InputError, match="not complete: it has 249 of 250 trainings"):
        table_of(recipe_of(file))


def rewritten(path, *, cells, rows=None, more=()):
    """A table of 3 nodes whose head says another number of cells, with some of its rows."""
    *head, columns = path.read_text().splitlines()[:7]
    lines = path.read_text().splitlines()[7:][:rows]
    head = [line.replace("# cells: 125", f"# cells: {cells}") for line in head]
    lines += [f"{cell},{seed},1.0,1,1.0" for cell in more for seed in (0, 1)]
    path.write_text("\n".join([*head, columns, *lines, ""]))
    return path


def test_the_space_says_how_many_cells_there_are(tmp_path):
    """A table that counts itself as complete is not believed."""
    path = write_csv(tmp_path / "cells.csv")
    file = rewritten(path, rows=20, cells=10)
    assert open_table(file, "digits").complete
    with pytest.raises(InputError, match=r"the space has 10 cells, but lacks \|none~0\|\+"):
        table_of(recipe_of(file))


def test_cells_that_are_none_make_no_table_complete(tmp_path):
    none = ("|none~0|", "|none~0|+|none~0|made_up~1|")
    file = rewritten(write_csv(tmp_path / "more.csv"), cells=127, more=none)
    with pytest.raises(
        InputError, match=r"has 127 cells, but the space nasbench201 .* nodes has 125"
    ):
        table_of(recipe_of(file))
    file = rewritten(write_csv(tmp_path / "cells.csv"), rows=246, cells=125, more=none)
    with pytest.raises(InputError, match="125 cells, but lacks"):
        table_of(recipe_of(file))


@pytest.mark.parametrize(
    ("nodes", "write", "said"),
    [(4, write_nats_file, "3 of 15,625"), (2, write_small_nats_file, "4 of 5")],
)
def test_a_part_of_nats_bench_is_not_complete(nodes, write, said, tmp_path, monkeypatch):
    """Its list of cells may be as short as its results."""
    monkeypatch.setattr("lfmcw_app.nats_bench.NODES", nodes)
    file = write(tmp_path, **({"leave_out": 1} if nodes == 2 else {}))
    with pytest.raises(InputError, match=f"not complete: it has {said} trainings"):
        table_of(recipe_of(file, dataset="cifar10", nodes=nodes))


def test_a_space_that_nobody_can_list_has_no_table(tmp_path):
    path = write_csv(tmp_path / "cells.csv")
    path.write_text(path.read_text().replace("# space: nasbench201", "# space: darts"))
    given = {"dataset": "digits", "search.nodes": 3, "lookup.file": str(path)}
    with pytest.raises(InputError, match="the space darts has too many cells"):
        table_of(load_recipe("smoke", overrides=given))


@pytest.mark.parametrize("name", ["NAS-Bench-201-v1_1-096897.pth", "folder"])
def test_other_formats_are_refused(name, tmp_path):
    path = tmp_path / name
    path.mkdir()
    with pytest.raises(InputError, match="take NATS-Bench's file or folder"):
        open_table(path, "cifar10")


def test_a_file_that_is_not_there_is_said():
    with pytest.raises(InputError, match=r"the table nowhere\.csv cannot be read"):
        recipe_of("nowhere.csv")


def test_a_large_table_is_read_and_hashed_once(table_file, monkeypatch):
    recipe = recipe_of(table_file)
    first = table_of(recipe)
    monkeypatch.setattr(lookup, "open_table", lambda *_: pytest.fail("read again"))
    monkeypatch.setattr(lookup.hashlib, "file_digest", lambda *_: pytest.fail("hashed again"))
    assert table_of(recipe) is first


def test_nats_bench_serves_its_data_sets(tmp_path, monkeypatch):
    monkeypatch.setattr("lfmcw_app.nats_bench.NODES", 2)
    file = write_small_nats_file(tmp_path)
    tables = [table_of(recipe_of(file, dataset=name, nodes=2)) for name in ("cifar10", "cifar100")]
    assert [table.dataset for table in tables] == ["cifar10", "cifar100"]
    with pytest.raises(InputError, match="but none on 'digits'"):
        table_of(recipe_of(file, nodes=2))


def test_nothing_can_start_from_weights_without_a_training(table_file):
    with pytest.raises(InputError, match="with lookup nothing is trained"):
        load_recipe("smoke", overrides={"lookup.file": "x", "evaluation.init.run": "y"})


def test_conditions_of_a_training_need_a_training():
    """The networks of a table had data of their own: a condition can be of the search alone."""
    given = {"lookup.file": "x", "data.imbalance": 0.1}
    with pytest.raises(InputError, match=r"set data\.conditions_apply_to to search"):
        load_recipe("smoke", overrides=given)
    assert not load_recipe(
        "smoke", overrides={**given, "data.conditions_apply_to": "search"}
    ).trains


def test_a_digest_needs_its_file():
    with pytest.raises(InputError, match="digest and dataset need file"):
        load_recipe("smoke", overrides={"lookup.digest": "x"})


# ------------------------------ the result


@pytest.fixture
def folder(table_file, tmp_path):
    """A folder of an evaluation, before its result."""
    folder = RunFolder.create(tmp_path / "run", recipe_of(table_file))
    folder.write(EVALUATED, CELL.to_json())
    return folder


def test_the_result_has_error_regret_and_rank(folder, table_file):
    result = look_up_genotype(folder, CELL)
    best = (made_error(SumCell(("nor_conv_3x3",) * 3), seed) for seed in (0, 1))
    error = sum(made_error(CELL, seed) for seed in (0, 1)) / 2
    assert result["test_error_percent"] == pytest.approx(error, abs=1e-4)
    assert result["lookup"] == {
        "file": "cells.csv",
        "digest": folder.recipe.lookup.digest,
        "dataset": "digits",
        "seeds": [0, 1],
        "regret_percent": pytest.approx(error - sum(best) / 2, abs=1e-4),
        "rank": table_of(folder.recipe).rank(CELL),
        "cells": 125,
        "best_cell": BEST,
    }
    assert result["parameters"] == 118_000
    assert result["genotype"] == CELL.to_data()
    assert RunFolder.open(folder.path).result == json.loads(json.dumps(result))
    assert not (folder.path / "network.pt").exists()


def test_what_the_search_measured_is_in_the_result(folder, monkeypatch):
    by_class = {
        "gan_test": [80.0, 100.0], "gan_train": [60.0, 60.0], "real": [90.0, 90.0],
        "variety": [0.05, 0.05],
    }  # fmt: skip
    measured = {
        "gan_test": 90.0, "gan_train": 60.0, "real": 90.0, "variety": 0.05, "by_class": by_class,
    }  # fmt: skip
    end = {"stage": "search", "round": 3, "generator": measured}
    monkeypatch.setattr("lfmcw_app.search_end.read_search_end", lambda folder: end)
    found = look_up(folder, CELL, table_of(folder.recipe))["generator"]
    (doubt,) = found.pop("doubts")
    assert json.loads(json.dumps(found)) == measured | {"chance": 50.0, "largest": None}
    assert doubt.startswith("The generator has collapsed")


def test_a_complete_look_up_is_not_repeated(folder, monkeypatch):
    result = look_up_genotype(folder, CELL)
    monkeypatch.setattr("lfmcw_app.complete_runs.table_of", lambda *_: pytest.fail("repeated"))
    assert look_up_genotype(folder, CELL) == result


def test_the_result_is_printed_with_its_source(folder):
    result = look_up(folder, CELL, table_of(folder.recipe))
    console = Console(record=True, width=1000)
    print_result(result, folder, console)
    said = console.export_text()
    assert "on digits, looked up in cells.csv (mean of 2 trainings), 118,000 parameters" in said
    assert (
        f"regret 4.50 percentage points against the best cell, rank 8 of 125; the best is {BEST}"
        in said
    )
    assert "Predict images" not in said


def test_the_report_shows_regret_and_rank(folder):
    look_up(folder, CELL, table_of(folder.recipe))
    page = write_report(folder.path).read_text("utf-8")
    assert '<div data-figure="regret"><dt>regret</dt><dd><b>4.50</b> <span>points' in page
    assert '<div data-figure="rank"><dt>rank of 125 cells</dt><dd><b>8</b>' in page
    assert 'href="#training"' not in page


@pytest.mark.parametrize("complete", [True, False])
def test_a_run_without_a_network_says_why(folder, complete):
    if complete:
        look_up(folder, CELL, table_of(folder.recipe))
    with pytest.raises(InputError, match="no trained network: its test error was looked up"):
        network_path(folder.path)


# ------------------------------ resuming


def resume(path, *assign, searches=False):
    return resumed_folder(
        path,
        searches=searches,
        dataset=None,
        config=None,
        options={},
        settings=parsed_settings(assign),
        out=None,
    )


def test_a_run_is_resumed_where_its_table_has_moved(folder, table_file, tmp_path):
    moved = tmp_path / "moved.csv"
    shutil.copy(table_file, moved)
    os.utime(moved, (1, 1))
    resumed = resume(folder.path, f"lookup.file={moved}")
    assert look_up_genotype(resumed, CELL)["lookup"]["file"] == "moved.csv"
    assert RunFolder.open(folder.path).recipe.lookup.file == str(moved)
    assert "changed" not in resumed.result  # no number depends on the place


def test_a_run_is_not_resumed_on_another_table(folder, tmp_path):
    other = write_csv(tmp_path / "other.csv", seeds=1)
    with pytest.raises(InputError, match="is not the table of the recipe"):
        resume(folder.path, f"lookup.file={other}")


def test_a_run_that_trains_does_not_become_a_look_up(table_file, tmp_path):
    settings = {"search.nodes": 3}
    recipe = resolve_recipe("digits", "smoke", None, settings, 0, space="nasbench201")
    RunFolder.create(tmp_path / "run", recipe)
    with pytest.raises(InputError, match=r"lookup\.digest None → .* cannot change during a run"):
        resume(tmp_path / "run", f"lookup.file={table_file}", searches=True)


@pytest.mark.parametrize("complete", [True, False])
def test_settings_of_a_training_change_nothing(folder, complete):
    if complete:
        look_up(folder, CELL, table_of(folder.recipe))
    with pytest.raises(InputError, match=r"because its error is looked up\. So evaluation"):
        resume(folder.path, "evaluation.epochs=7")


# ------------------------------ commands


def test_a_cell_is_looked_up_without_data(table_file, tmp_path, monkeypatch):
    from typer import Typer

    from lfmcw_app.commands.evaluate import evaluate

    monkeypatch.setattr("lfmcw_app.data_checks.reader", lambda: pytest.fail("read"))
    app = Typer()
    app.command()(evaluate)
    arguments = ["digits", "--space=nasbench201", "--set=search.nodes=3"]
    arguments += [f"--lookup={table_file}", f"--out={tmp_path / 'run'}"]
    done = CliRunner().invoke(app, [CELL.notation(), *arguments])
    assert done.exit_code == 0, done.output
    assert "rank 8 of 125" in " ".join(done.output.split())
    assert RunFolder.open(tmp_path / "run").result["lookup"]["rank"] == 8
    again = CliRunner().invoke(app, [f"--resume={tmp_path / 'run'}"])
    assert again.exit_code == 0, again.output

    for refused in ("--dry-run", "--max-steps=2"):
        done = CliRunner().invoke(app, [CELL.notation(), *arguments[:-1], refused])
        assert done.exit_code == 2
        assert "with --lookup nothing is trained" in " ".join(done.output.split())


def test_a_refusal_is_one_paragraph(table_file):
    console = Console(record=True, width=1000)
    with pytest.raises(Exception, match="2"), reported_errors(console):
        table_of(recipe_of(table_file, nodes=4))
    assert console.export_text().count("\n") == 1
