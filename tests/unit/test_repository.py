"""What the repository as a whole promises: public names, the citation, hooks before a commit."""

from __future__ import annotations

import ast
import importlib
import re
import tomllib
from pathlib import Path

import pytest
import yaml

import mlo

ROOT = Path(__file__).parents[2]


def test_every_public_name_exists_is_documented_and_completes():
    for name in mlo.__all__:
        assert name in dir(mlo)
        assert getattr(mlo, name).__doc__
    assert (Path(mlo.__file__).parent / "py.typed").exists()


def test_completion_shows_public_names_only():
    shown = {name for name in dir(mlo) if not name.startswith("_")}
    assert shown == set(mlo.__all__)


def imported_names(path):
    """(module, name) for every name that a file imports from mlo or a module of it."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        module = getattr(node, "module", None) or ""
        if isinstance(node, ast.ImportFrom) and module.split(".")[0] == "mlo":
            for alias in node.names:
                yield module, alias.name


def test_the_application_imports_public_names_only():
    """The import contracts look at modules; this looks at the names in them."""
    found = set()
    for path in (ROOT / "lfmcw_app").rglob("*.py"):
        found.update(imported_names(path))
    assert len(found) > 10
    private = [
        (module, name)
        for module, name in sorted(found)
        if name not in importlib.import_module(module).__all__
    ]
    assert private == []


def test_the_citation_names_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert str(citation["version"]) == mlo.__version__
    assert citation["license"] == "Apache-2.0"
    assert {"cff-version", "message", "title", "authors"} <= set(citation)


def test_the_hooks_before_a_commit_are_the_checks_of_ci():
    """The hooks before a commit are the checks of CI, and fetch nothing."""
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))
    hooks = [hook for repository in config["repos"] for hook in repository["hooks"]]
    assert {repository["repo"] for repository in config["repos"]} == {"local"}
    assert {hook["language"] for hook in hooks} == {"system"}
    programs = {hook["entry"].split()[0].removeprefix(".venv/bin/") for hook in hooks}
    makefile = (ROOT / "Makefile").read_text("utf-8")
    checks = makefile.split("\ncheck:")[1].split("\n\n")[0]
    assert programs == {line.split("$(BIN)/")[1].split()[0] for line in checks.splitlines()[1:]}


# `mlo` on PyPI is somebody else's package.
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
INSTALLS_ANOTHER = re.compile(r"pip3? install [^`\n#]*(?<![\w./-])mlo(?![\w./-])|['\"]mlo\[")
EXTRA = re.compile(r"(?:torch-mlo|-e '?\.)\[([\w,]+)\]")


def texts_of_users():
    folders = ("docs", "mlo", "lfmcw_app", "examples", "benchmarks", ".github")
    for path in (file for folder in folders for file in (ROOT / folder).rglob("*")):
        if path.suffix in (".md", ".py", ".ipynb", ".yml", ".yaml", ".sh", ".html"):
            yield path, path.read_text("utf-8")
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "Makefile"):
        yield ROOT / name, (ROOT / name).read_text("utf-8")


def test_nothing_tells_users_to_install_another_package():
    assert PROJECT["name"] == "torch-mlo"
    named, wrong = set(), []
    for path, text in texts_of_users():
        wrong += [(path.name, match[0]) for match in INSTALLS_ANOTHER.finditer(text)]
        for match in EXTRA.finditer(text):
            named.update(match[1].split(","))
    assert wrong == []
    assert named - {"extra", "name"} <= set(PROJECT["optional-dependencies"]) and "export" in named


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("pip install mlo", True),
        ("pip install 'mlo[ray]'", True),
        ("run: `pip install -U mlo` first", True),
        ("pip install 'torch-mlo[ray]'", False),
        ("pip install -e .  # mlo is imported afterwards", False),
        ("pip install -e .", False),
        ("pip install torch-mlo", False),
        ("pip install ./mlo", False),
    ],
)
def test_the_wrong_name_is_recognised(text, found):
    assert bool(INSTALLS_ANOTHER.search(text)) is found


# ------------------------------ for those who contribute


def test_contributing_names_targets_and_files_that_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = set(re.findall(r"(?:`|^)make ([a-z-]+)", text, re.MULTILINE))
    assert {"check", "test", "test-all"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target}"
    named = re.findall(r"`((?:mlo|lfmcw_app|tests|docs|benchmarks|\.github|\.ci)/[\w./-]+)`", text)
    named = [file for file in named if "PACKAGE" not in file]
    assert len(named) > 10
    for file in named:
        assert (ROOT / file).exists(), file
    for page, anchor in re.findall(r"\((docs/[\w-]+\.md)(?:#([\w-]+))?\)", text):
        headings = re.findall(r"^#+ (.*)$", (ROOT / page).read_text("utf-8"), re.MULTILINE)
        anchors = {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in headings}
        assert not anchor or anchor in anchors, f"{page}#{anchor}"


def test_templates_of_issues_ask_for_what_is_needed():
    folder = ROOT / ".github" / "ISSUE_TEMPLATE"
    forms = {
        path.stem: yaml.safe_load(path.read_text("utf-8"))
        for path in folder.glob("*.yml")
        if path.stem != "config"
    }
    assert set(forms) == {"bug", "wrong-gradient", "question"}
    required = {}
    for name, form in forms.items():
        assert {"name", "description", "body"} <= set(form)
        fields = [field for field in form["body"] if field["type"] != "markdown"]
        assert len({field["id"] for field in fields}) == len(fields)
        for field in fields:
            assert field["attributes"]["label"]
        required[name] = {
            field["id"] for field in fields if field.get("validations", {}).get("required")
        }
    assert {"happened", "info"} <= required["bug"]
    assert {"program", "oracle", "found", "info"} <= required["wrong-gradient"]
    assert required["question"] == {"question"}


def test_templates_name_no_host_and_no_person():
    for path in (ROOT / ".github").rglob("*.*"):
        text = path.read_text("utf-8")
        assert "http" not in text
        assert "@" not in text
