"""The wheel, built and installed into an environment of its own, runs from anywhere."""

from __future__ import annotations

import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from started_processes import finished

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_wheel_installs_and_runs_in_a_clean_environment(tmp_path):
    pytest.importorskip("build")
    pytest.importorskip("hatchling")
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(tmp_path / "dist"),
        str(ROOT),
    ]
    built = finished(command)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = (tmp_path / "dist").glob("torch_mlo-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {
        "mlo/py.typed",
        "lfmcw_app/recipes/smoke.yaml",
        "lfmcw_app/report/templates/run.html",
    } <= names
    assert not any(name.startswith(("tests/", "docs/")) for name in names)
    venv.create(tmp_path / "clean", with_pip=True)
    clean = tmp_path / "clean" / "bin"
    install = [
        clean / "python",
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-index",
        "--no-deps",
        wheel,
    ]
    installed = finished(install)
    assert installed.returncode == 0, installed.stderr
    # The dependencies come from this environment; its own editable copy of the packages does not,
    # since a path file is read only in a site folder.
    environment = {
        "PYTHONPATH": sysconfig.get_path("purelib"),
        "PATH": str(clean),
        "HOME": str(tmp_path),
    }

    def run(*arguments):
        program = [clean / arguments[0], *arguments[1:]]
        return finished(program, cwd=tmp_path, env=environment)

    where = run("python", "-c", "import mlo, lfmcw_app; print(mlo.__file__, lfmcw_app.__file__)")
    assert where.stdout.count(str(tmp_path / "clean")) == 2, where.stdout + where.stderr
    assert run("python", "-m", "mlo.info").returncode == 0
    settings = [
        "search.nodes=1", "search.steps=1", "search.batch_size=8", "data.search_images=40",
        "data.train_images=40", "data.test_images=20", "evaluation.channels=2",
        "evaluation.epochs=1", "evaluation.batch_size=16", "search.method=darts",
    ]  # fmt: skip
    done = run(
        "lfmcw",
        "digits",
        "--threads=1",
        "--out",
        "run",
        *(f"--set={setting}" for setting in settings),
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "report.html").exists()
    compared = run("lfmcw-report", "run", "--out", "again.html")
    assert compared.returncode == 0, compared.stderr
