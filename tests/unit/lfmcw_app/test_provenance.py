"""What is recorded of the program and the machine behind a result."""

from __future__ import annotations

import platform
import subprocess

import pytest
import torch

import mlo
from lfmcw_app import provenance
from lfmcw_app.provenance import commit, device_kind, made_by


def git(folder, *arguments):
    settings = ("-c", "user.name=nobody", "-c", "user.email=nobody@example.org")
    return subprocess.run(
        ["git", "-C", folder, *settings, *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.fixture
def repository(tmp_path):
    """A repository with a commit."""
    git(tmp_path, "init", "-q")
    (tmp_path / "file").write_text("one")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-qm", "first")
    return tmp_path


def test_the_commit_is_named_and_whether_files_differ(repository):
    first = git(repository, "rev-parse", "--short", "HEAD")
    assert commit(repository) == first
    (repository / "file").write_text("two")
    commit.cache_clear()
    assert commit(repository) == f"{first}-dirty"


def test_the_repository_around_an_installation_does_not_count(repository):
    (repository / "site-packages").mkdir()
    assert commit(repository / "site-packages") is None


def test_there_may_be_no_repository_and_no_git(tmp_path, monkeypatch):
    assert commit(tmp_path) is None
    monkeypatch.setenv("PATH", "")
    assert commit(tmp_path / "elsewhere") is None


@pytest.mark.parametrize(
    ("text", "kind"),
    [("processor: 0\nmodel name\t: A CPU @ 2 GHz\n", "A CPU @ 2 GHz"), ("model name : \n", None)],
)
def test_the_kind_of_cpu_is_named(text, kind, tmp_path, monkeypatch):
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(provenance, "CPU_INFO", tmp_path / "cpuinfo")
    expected = kind or platform.processor() or platform.machine()
    assert device_kind(torch.device("cpu")) == expected
    monkeypatch.setattr(provenance, "CPU_INFO", tmp_path / "missing")
    assert device_kind(torch.device("cpu")) == platform.processor() or platform.machine()


def test_the_machine_has_no_name_in_it():
    made = made_by(torch.device("cpu"))
    assert set(made) == {"time", "mlo", "commit", "torch", "device"}
    assert (made["mlo"], made["torch"]) == (mlo.__version__, torch.__version__)
    assert platform.node() not in made.values()
