"""The code in the README and the docs runs as pasted."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCKS = [
    (path.relative_to(ROOT), number, code)
    for path in sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", path.read_text("utf-8"), re.DOTALL))
]


@pytest.mark.parametrize(("path", "number", "code"), BLOCKS, ids=lambda value: str(value)[:30])
def test_code_blocks_run_as_pasted(path, number, code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, f"{path}:{number}", "exec"), {})
    assert capsys.readouterr().out


def test_the_readme_stays_short():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 120


def test_links_between_the_documents_hold():
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)[^):]*\)", path.read_text("utf-8")):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"
