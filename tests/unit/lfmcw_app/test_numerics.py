"""TF32 and algorithms that repeat: set for a phase, put back after it, refused in plain words."""

from __future__ import annotations

import os

import pytest
import torch

from lfmcw_app.errors import InputError
from lfmcw_app.numerics import WORKSPACE, described_numerics, numerics_of
from lfmcw_app.recipe_loading import load_recipe


def settings():
    """What PyTorch is told, and the workspace of cuBLAS."""
    return {
        "convolutions": torch.backends.cudnn.allow_tf32,
        "products": torch.backends.cuda.matmul.allow_tf32,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cudnn": torch.backends.cudnn.deterministic,
        "benchmark": torch.backends.cudnn.benchmark,
        "workspace": os.environ.get(WORKSPACE),
    }


@pytest.fixture(autouse=True)
def cudnn_as_a_user_may_have_it(monkeypatch):
    """Neither PyTorch's defaults nor what a recipe asks for, so that both show."""
    monkeypatch.delenv(WORKSPACE, raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def recipe(**settings):
    return load_recipe(
        "smoke", overrides={key.replace("_", ".", 1): v for key, v in settings.items()}
    )


def test_a_phase_has_its_numbers_and_leaves_no_trace():
    before = settings()
    with numerics_of(recipe(), "search"):
        exact = settings()
        with numerics_of(recipe(), "evaluation"):
            assert settings()["convolutions"] and settings()["products"]
        assert settings() == exact
    assert exact == before | {"convolutions": False, "products": False}
    assert settings() == before


def test_an_error_leaves_no_trace_either():
    before = settings()
    with pytest.raises(KeyError), numerics_of(recipe(search_deterministic=True), "search"):
        raise KeyError
    with pytest.raises(RuntimeError, match="shapes"), numerics_of(recipe(), "search"):
        raise RuntimeError("shapes")
    assert settings() == before


def test_deterministic_sets_all_that_pytorch_has():
    with numerics_of(recipe(search_deterministic=True, search_tf32=True), "search"):
        assert settings() == {
            "convolutions": True,
            "products": True,
            "deterministic": True,
            "cudnn": True,
            "benchmark": False,
            "workspace": ":4096:8",
        }


def test_cublas_is_prepared_before_the_phase_that_asks():
    """cuBLAS reads its workspace at its first call, which the search may make."""
    of_training = recipe(evaluation_deterministic=True)
    with numerics_of(of_training, "search"):
        assert settings()["workspace"] == ":4096:8"
        assert not settings()["deterministic"]
    assert settings()["workspace"] is None


def test_a_workspace_of_the_user_stays(monkeypatch):
    monkeypatch.setenv(WORKSPACE, ":16:8")
    with numerics_of(recipe(search_deterministic=True), "search"):
        assert settings()["workspace"] == ":16:8"
    assert settings()["workspace"] == ":16:8"
    monkeypatch.setenv(WORKSPACE, ":0:0")
    words = r"search\.deterministic needs CUBLAS.* :4096:8, :16:8, .* has ':0:0'\. Unset it"
    with (
        pytest.raises(InputError, match=words),
        numerics_of(recipe(search_deterministic=True), "search"),
    ):
        raise AssertionError


def test_an_operation_that_cannot_repeat_is_named():
    x, where = torch.zeros(3), torch.tensor([0, 0])
    words = r"evaluation\.deterministic is true, .* for put_ on .* evaluation\.deterministic=false"
    with (
        pytest.raises(InputError, match=words),
        numerics_of(recipe(evaluation_deterministic=True), "evaluation"),
    ):
        x.put_(where, torch.tensor([1.0, 2.0]))
    x.put_(where, torch.tensor([1.0, 2.0]))


def test_a_late_workspace_is_told_by_its_remedy():
    said = (
        "Deterministic behavior was enabled with either `torch.use_deterministic_algorithms(True)` "
        "or `at::Context::setDeterministicAlgorithms(true)`, but this operation is not "
        "deterministic because it uses CuBLAS and you have CUDA >= 10.2."
    )
    words = r"already used cuBLAS .* Set CUBLAS_WORKSPACE_CONFIG=:4096:8 in the environment"
    with (
        pytest.raises(InputError, match=words),
        numerics_of(recipe(search_deterministic=True), "search"),
    ):
        raise RuntimeError(said)


def test_numerics_are_described_as_they_are_set():
    asked = recipe(search_order="first", search_precision="bf16", evaluation_deterministic=True)
    described = described_numerics(asked)
    assert described["search"]["autocast"] == "bfloat16"
    assert described["evaluation"]["autocast"] is None
    for section in ("search", "evaluation"):
        of_section = dict(described[section])
        del of_section["autocast"]
        with numerics_of(asked, section):
            for name, value in of_section.items():
                found = torch
                for part in name.split("."):
                    found = getattr(found, part)
                if callable(found):
                    found = torch.are_deterministic_algorithms_enabled()
                assert found == value, name
