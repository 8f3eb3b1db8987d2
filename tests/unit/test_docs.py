"""The code in the README and the docs runs as pasted."""

from __future__ import annotations

import ast
import csv
import importlib
import importlib.util
import inspect
import re
import shlex
import shutil
from dataclasses import is_dataclass

import pytest
import torch
import typer
import yaml
from code_blocks import BLOCKS, ROOT, blocks_of, require, run
from trained_runs import trained_run

import mlo
from lfmcw_app.commands.draw import draw as draw_command
from lfmcw_app.commands.evaluate import evaluate as evaluate_command
from lfmcw_app.commands.export import export as export_command
from lfmcw_app.commands.predict import predict as predict_command
from lfmcw_app.commands.run import run as run_command
from lfmcw_app.commands.sample import sample as sample_command
from lfmcw_app.commands.table import table as table_command
from lfmcw_app.generators import GAMES
from lfmcw_app.recipe_loading import parsed_settings
from lfmcw_app.resolving import resolve_recipe
from lfmcw_app.search_space.operations import PRIMITIVES
from lfmcw_app.spaces import SPACES
from mlo.hypergradient import AbstractEngine, registry

CONTINUED = ["first-ten-minutes.md", "tutorial.md"]
"""Pages whose blocks continue each other; each is followed by what it prints."""


PRODUCTS = ["autograd", "finite_difference"]
"""Names that are no engine's, but of how an engine takes its products."""


NEEDS_A_RUN = {"using-the-network.md"}
"""Pages whose blocks use a finished run, runs/pictures, of the images in pictures."""


def prepare_run(folder, monkeypatch):
    trained = trained_run(folder, monkeypatch)
    shutil.copytree(trained.path, folder / "runs" / "pictures")
    shutil.copy(trained.path / "evaluated.json", folder / "runs" / "pictures" / "genotype.json")


def separate_blocks():
    """The blocks that run alone; those that need a run first are slow."""
    for block in BLOCKS:
        if block[0].name not in CONTINUED:
            slow = block[0].name in NEEDS_A_RUN
            yield pytest.param(*block, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize(
    ("path", "number", "code"),
    list(separate_blocks()),
    ids=lambda value: str(value)[:30],
)
def test_code_blocks_run_as_pasted(path, number, code, tmp_path, monkeypatch, capsys):
    if needed := re.match(r"# needs (\S+)", code):
        require(needed[1])
    monkeypatch.chdir(tmp_path)
    if path.name in NEEDS_A_RUN:
        prepare_run(tmp_path, monkeypatch)
    monkeypatch.setattr(
        "lfmcw_app.generator_quality.STEPS", 10
    )  # of a judge, in the runs of blocks
    # A block may register an engine, or an entry of the application's tables.
    monkeypatch.setattr(registry, "_FACTORIES", dict(registry._FACTORIES))
    for table in (PRIMITIVES, SPACES, GAMES):
        monkeypatch.setattr(table, "_entries", dict(table._entries))
    run(code, f"{path}:{number}")
    assert capsys.readouterr().out


@pytest.mark.parametrize("page", CONTINUED)
def test_continued_blocks_print_what_they_say(page, capsys):
    text = (ROOT / "docs" / page).read_text("utf-8")
    codes, outputs = blocks_of(text, "python"), blocks_of(text, "text")
    assert len(codes) == text.count("```python") == text.count("```text") > 2
    names = {}
    for number, (code, said) in enumerate(zip(codes, outputs, strict=True), start=1):
        exec(compile(code, f"{page}:{number}", "exec"), names)
        printed = capsys.readouterr().out
        figures = r"-?\d+(?:\.\d+)?(?:e[+-]\d+)?"
        assert re.sub(figures, "#", printed) == re.sub(figures, "#", said)
        for here, there in zip(
            re.findall(figures, printed), re.findall(figures, said), strict=True
        ):
            if "e" in there:  # an error: its size counts
                assert float(here) < 10 * float(there)
            else:
                assert float(here) == pytest.approx(float(there), abs=0.02)


PRINTED = re.compile(r"```python\n([^`]*)```\n\nIt prints:\n\n```text\n([^`]*)```")
"""A block, and what a page says that it prints."""


def test_blocks_print_what_a_page_says_that_they_print(capsys):
    found = [
        (path.name, *block)
        for path in sorted((ROOT / "docs").glob("*.md"))
        for block in PRINTED.findall(path.read_text("utf-8"))
    ]
    assert "choosing-an-engine.md" in [page for page, *_ in found]
    for page, code, said in found:
        run(code, page)
        assert capsys.readouterr().out == said, page


def test_the_programs_moved_from_betty_end_at_the_same_weights(capsys):
    """With another import, and declared anew; and on Betty, where it is installed."""
    program, declared = (c for path, _, c in BLOCKS if path.name == "migrating-from-betty.md")
    ends = [run(program, "another import"), run(declared, "declared anew")]
    if importlib.util.find_spec("betty"):
        before = program.replace("mlo.compat.betty", "betty")
        assert before.count("from betty.") == 3
        ends.append(run(before, "on Betty"))
    torch.manual_seed(0)  # as all of them begin
    torch.randn(64, 5), torch.randn(64, 1), torch.nn.Linear(5, 1)
    initial = torch.nn.Linear(1, 32, bias=False).weight
    assert float((ends[0]["weights"].weight - initial).detach().abs().max()) > 0.1
    for end in ends[1:]:
        for module in ("net", "weights"):
            assert torch.allclose(end[module].weight, ends[0][module].weight, rtol=1e-4, atol=1e-6)


def public_members_of_betty():
    """Names of what Betty's users call, define or set: methods, attributes and options."""
    for module, names in {
        "engine": ["Engine"],
        "problems": ["Problem", "ImplicitProblem", "IterativeProblem", "HigherIterativeProblem"],
        "configs": ["Config", "EngineConfig"],
        "envs": ["Env"],
        "misc.early_stopping": ["EarlyStopping"],
        "logging": ["LoggerBase", "TensorBoardLogger", "WandBLogger"],
    }.items():
        for name in names:
            found = getattr(importlib.import_module(f"betty.{module}"), name)
            yield name
            yield from vars(found)
            if "__init__" in vars(found) and not is_dataclass(found):
                yield from re.findall(r"self\.(\w+) =", inspect.getsource(found.__init__))
    for module in ("utils", "hypergradient", "optim", "patch.data_loader", "patch.optimizer"):
        found = importlib.import_module(f"betty.{module}")
        for name, value in vars(found).items():
            if callable(value) and getattr(value, "__module__", "").startswith("betty"):
                yield name


def test_the_guide_names_every_public_member_of_betty():
    require("betty-ml")
    text = (ROOT / "docs" / "migrating-from-betty.md").read_text("utf-8")
    text = re.sub("```.*?```", "", text, flags=re.DOTALL)
    members = {name for name in public_members_of_betty() if not name.startswith("_")}
    assert len(members) > 150
    words = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`]+)`", text))))
    assert sorted(members - words) == []


NAMED = [
    (path.name, file, name)
    for path in sorted((ROOT / "docs").glob("*.md"))
    for file, name in re.findall(
        r"`((?:mlo|lfmcw_app|tests|benchmarks|examples)/[\w./-]+\.\w+)(?:: ([\w.]+))?[` ]",
        path.read_text("utf-8"),
    )
]


def test_the_gallery_has_every_example_and_its_picture():
    listed = {
        file for page, file, _ in NAMED if page == "examples.md" and file.startswith("examples/")
    }
    programs = sorted((ROOT / "examples").glob("*.py"))
    assert listed == {str(path.relative_to(ROOT)) for path in programs}
    text = (ROOT / "docs" / "examples.md").read_text("utf-8")
    pictures = set(re.findall(r"\]\(gallery/(\w+)\.svg\)", text))
    assert pictures == {path.stem for path in programs}
    for name in pictures:
        size = (ROOT / "docs" / "gallery" / f"{name}.svg").stat().st_size
        assert 1_000 < size < 300_000, name


def test_figures_on_the_first_page_are_the_measured_ones():
    index = (ROOT / "docs" / "index.md").read_text("utf-8")
    why = " ".join(index.split("## Why mlo")[1].split("\n## ")[0].split())
    benchmarks = (ROOT / "docs" / "benchmarks.md").read_text("utf-8")
    rows = re.findall(r"^\| (.+) \|$", benchmarks, re.MULTILINE)
    cells = [row.split(" | ") for row in rows]
    peers = {row[0]: row for row in cells if len(row) == 5}
    for peer in ("BOAT", "TorchOpt", "Betty"):
        assert f"{peer} in {peers[peer][1]}" in why
    for peer, phrase in {"higher": "as higher", "JAXopt, compiled": "as compiled JAXopt"}.items():
        low, high = (peers[peer][column].split()[0] for column in (2, 4))
        assert re.search(rf"{low} to {high} times as long {phrase}", why)
    errors = {(row[0], row[1], row[2]): row[3] for row in cells if len(row) == 8}
    ours, theirs = (errors["diamond", library, "cg, K=50"] for library in ("mlo", "Betty"))
    assert f"are off by {ours}; Betty's are off by {theirs}" in why
    overheads = [
        float(row[7].split()[0])
        for row in cells
        if len(row) == 9
        and row[1].replace(",", "").isdigit()
        and int(row[1].replace(",", "")) > 9e5
    ]
    assert f"{min(overheads):.2f} to {max(overheads):.2f} times as long as the same updates" in why
    found = search_exactness()
    assert f"agrees to {found['all primitives']} with its equations" in why


def exactness_rows():
    """The rows of the measurement of all engines."""
    with (ROOT / "docs" / "data" / "exactness.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def search_exactness():
    """Which operations a tiny search had → the error of its architecture's gradient."""
    return {
        re.search(r"\((.+?),", row["cases"])[1]: row["relative error"]
        for row in exactness_rows()
        if row["engine"] == "one_step" and row["cases"].startswith("architecture gradient")
    }


def test_the_exactness_of_every_engine_is_measured_and_dated():
    rows = exactness_rows()
    assert {row["engine"] for row in rows} == set(registry._FACTORIES)
    assert all(float(row["relative error"]) < 1e-6 for row in rows)
    assert all("seed" in row["cases"] or "that search" in row["cases"] for row in rows)
    text = (ROOT / "docs" / "benchmarks.md").read_text("utf-8")
    block = text.split("<!-- begin: exactness -->")[1].split("<!-- end: exactness -->")[0]
    for part in ("command", "machine", "date", "versions"):
        assert all(row[part] and row[part] in block for row in rows), part
    assert all(f"| {row['relative error']} |" in block for row in rows)


def test_files_and_functions_that_the_docs_name_exist():
    assert any(page == "method.md" and name for page, _, name in NAMED)
    for page, file, name in NAMED:
        assert (ROOT / file).is_file(), f"{page} names {file}"
        if name:
            tree = ast.parse((ROOT / file).read_text("utf-8"))
            assert name in set(defined(tree)), f"{page} names {name} in {file}"


def equation_rows():
    """Equation → the files and names in its rows on the method's page; a row without a number
    belongs to the one above.
    """
    text = (ROOT / "docs" / "method.md").read_text("utf-8")
    rows = {}
    for table in re.findall(r"^\| equation \|.*\n.*\n((?:\|.*\n)+)", text, re.MULTILINE):
        equations = []
        for first, rest in re.findall(r"^\|(.*?)\|(.*)$", table, re.MULTILINE):
            if first.strip():
                equations = [
                    int(number) for number in re.findall(r"\d+", first) if "Algorithm" not in first
                ]
            for equation in equations:
                rows.setdefault(equation, set()).update(
                    re.findall(r"`([\w./]+\.py): ([\w.]+)`", rest)
                )
    return rows


def test_every_equation_of_the_method_names_what_implements_it():
    rows = equation_rows()
    assert sorted(rows) == list(range(1, 20))
    assert all(rows.values()), rows
    claims = [
        (int(equation), str(path.relative_to(ROOT)), node.name)
        for path in (ROOT / "lfmcw_app").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.FunctionDef)
        for equation in re.findall(r"(?:\(|LFM-CW, )Eq\. (\d+)", ast.get_docstring(node) or "")
    ]
    assert {equation for equation, *_ in claims} == {1, 2, 3, 4, 19}
    for equation, file, name in claims:
        assert (file, name) in rows[equation], (
            f"{name} says that it implements Eq. {equation}; docs/method.md does not"
        )


def test_messages_that_the_docs_quote_are_in_the_sources():
    messages = "\n".join(
        message
        for package in ("mlo", "lfmcw_app")
        for path in (ROOT / package).rglob("*.py")
        for message in messages_in(path)
    )
    text = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
    quoted = re.findall("^\\|(.*?)\\|", text, re.MULTILINE)
    fragments = [
        part
        for cell in quoted
        for quote in re.findall("“(.*?)”", cell)
        for part in quote.split("…")
    ]
    assert len(fragments) > 50
    assert [part for part in fragments if part.strip() not in messages] == []


def messages_in(path):
    """The texts of a source, with a zero byte in the place of what is filled in."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if is_text(part) else "\0" for part in node.values]
            yield "".join(parts)
        elif is_text(node):
            yield node.value


def is_text(node):
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


COMMANDS = {
    "run": run_command,
    "evaluate": evaluate_command,
    "draw": draw_command,
    "table": table_command,
    "predict": predict_command,
    "export": export_command,
    "sample": sample_command,
}


def test_commands_that_the_docs_write_out_are_understood():
    lines = [
        (path.name, *line.split("#")[0].split(maxsplit=3)[2:])
        for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
        for block in blocks_of(path.read_text("utf-8"), "bash")
        for line in block.splitlines()
        if re.match(rf"\S*python -m lfmcw_app\.({'|'.join(COMMANDS)}) ", line)
    ]
    assert {page for page, *_ in lines} >= {"README.md", "first-ten-minutes.md", "reproducing.md"}
    for page, module, text in lines:
        app = typer.Typer()
        app.command()(COMMANDS[module.rpartition(".")[2]])
        text = re.sub(r" > \S+", "", text)  # the shell's
        text = re.sub(r"\b[KS]\b", "0", text).replace("TABLE", "table2")  # what is to be filled in
        given = typer.main.get_command(app).make_context(page, shlex.split(text)).params
        if given.get("dataset") is not None:
            given["settings"] = parsed_settings(given.get("assign") or ())
            options = ("dataset", "preset", "config", "settings", "seed")
            resolve_recipe(*(given.get(key) for key in options), space=given["space"])


def defined(tree, prefix=""):
    """The functions, classes, methods and assigned names of a module."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield prefix + node.name
        if isinstance(node, ast.ClassDef):
            yield from defined(node, f"{prefix}{node.name}.")
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (prefix + target.id for target in targets if isinstance(target, ast.Name))


def test_the_readme_stays_short():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 150


def test_links_between_the_documents_hold():
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        text = path.read_text("utf-8")
        pictures = re.findall(r'\bsrc(?:set)?="([^":]+)"', text)
        for target in [*re.findall(r"\]\(([^)#:]+)[^):]*\)", text), *pictures]:
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


def paragraphs_shown_as_code(text):
    """Paragraphs outside of fences that Markdown takes for code, since they are indented more than
    what they continue.
    """
    text = re.sub(r"^( *)(```+).*?^\1\2 *$", r"\1.", text, flags=re.MULTILINE | re.DOTALL)
    before, after_blank = "", True
    for line in text.splitlines():
        deeper = len(line) - len(line.lstrip()) >= len(before) - len(before.lstrip()) + 4
        opens = re.match(r" *([-*] |\d+\. |===|!!!|\?\?\?)", before)
        if line.strip() and after_blank and deeper and not opens:
            yield line.strip()
        before, after_blank = line if line.strip() else before, not line.strip()


def test_no_paragraph_of_a_page_is_shown_as_code():
    """All code is in fences, so an indented paragraph is a mistake."""
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        assert list(paragraphs_shown_as_code(path.read_text("utf-8"))) == [], path.name


def test_no_key_of_the_sites_settings_hides_another():
    for path in ROOT.glob("mkdocs*.yml"):
        keys = re.findall(r"^(\w+):", path.read_text("utf-8"), re.MULTILINE)
        assert len(keys) == len(set(keys)), path.name


FILLED_IN = {"K": 3, "N": 3, "S": 3, "a": 0.1, "d": 0.1, "r": 0.1, "t": 0.1, "α": 0.1}
"""Letters that stand for a number in what the pages write → a number."""


def engines_in(text):
    """The engines that a page writes out in its prose and tables, with their options."""
    names = {name for name in mlo.__all__ if isinstance(getattr(mlo, name), type)}
    engines = "|".join(name for name in names if issubclass(getattr(mlo, name), AbstractEngine))
    text = re.sub("```.*?```", "", text, flags=re.DOTALL)
    return re.findall(rf'`(\{{"name": [^`]*\}}|(?:mlo\.)?(?:{engines})\([^`]*\))`', text)


def test_engines_that_the_pages_write_out_can_be_made():
    found = {
        (path.name, engine)
        for path in (ROOT / "docs").glob("*.md")
        for engine in engines_in(path.read_text("utf-8"))
        if "..." not in engine
    }
    assert {page for page, _ in found} >= {"stochastic-methods.md", "migrating-from-torchopt.md"}
    makers = {"mlo": mlo, **vars(mlo), **FILLED_IN}
    for page, engine in sorted(found):
        made = eval(engine, makers)
        if isinstance(made, dict) and made["name"] not in PRODUCTS:
            made = mlo.engine_from(made)
        assert made, page


def test_the_reference_documents_every_public_name_once():
    listed = re.findall(
        r"^::: mlo\.(\w+)$",
        (ROOT / "docs" / "reference" / "mlo.md").read_text("utf-8"),
        re.MULTILINE,
    )
    assert sorted(listed) == sorted(mlo.__all__)


def pages_of(menu):
    """The pages below an entry of the site's menu."""
    if isinstance(menu, str):
        return [menu]
    assert menu, "an empty section"
    below = menu if isinstance(menu, list) else menu.values()
    return [page for entry in below for page in pages_of(entry)]


def test_every_page_is_reached_once_from_the_sites_menu():
    menu = (ROOT / "mkdocs.yml").read_text("utf-8").split("\nnav:")[1]
    sources = [path for kind in ("md", "ipynb") for path in (ROOT / "docs").rglob(f"*.{kind}")]
    # A notebook becomes the page of its name.
    pages = [str(path.relative_to(ROOT / "docs").with_suffix(".md")) for path in sources]
    assert sorted(pages_of(yaml.safe_load(menu))) == sorted(pages)
