"""Two and four processes on gloo, each with its shard of every batch, against one process on the
whole batches.
"""

from __future__ import annotations

import copy
import warnings

import data_parallel_cases as cases
import pytest
import torch
from several_processes import launch

import mlo
from mlo.distributed import SyncBatchNorm, _rows


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """size → what each of that many processes found, and the folder with their states; each run
    once.
    """
    known = {}

    def of(size):
        if size not in known:
            folder = tmp_path_factory.mktemp(f"processes{size}")
            single = cases.resumable(None, None)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                list(single.run(2))
            mlo.save_checkpoint(single.state_dict(), folder / "single.pt")
            launch(size, folder)
            known[size] = [torch.load(folder / f"{rank}.pt") for rank in range(size)], folder
        return known[size]

    return of


@pytest.fixture(scope="module")
def alone():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return cases.everything(2, None, None)


def error(found, exact):
    if "refused" in exact:
        assert found.get("refused") == exact["refused"]
        return 0.0
    assert set(found) == set(exact)
    return max(
        float((found[key] - exact[key]).double().norm() / (exact[key].double().norm() + 1e-12))
        for key in exact
    )


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_several_processes_equal_one_on_the_whole_batch(several, alone, size):
    """Several processes equal one on the whole batch, with every engine."""
    results, _ = several(size)
    found = results[0]
    errors = {key: error(value, alone[key]) for key, value in found.items() if key in alone}
    assert max(errors.values()) < 1e-10, {key: e for key, e in errors.items() if e >= 1e-10}
    tried = {engine for graph, engine in errors if "refused" not in found[graph, engine]}
    missing = set(mlo.available_engines()) - tried
    assert missing <= (set() if cases.has_betty() else set(cases.BETTY))
    assert {graph for graph, _ in errors} == {*cases.GRAPHS, "coupled", "uneven"}


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_all_processes_hold_the_same_bits(several, size):
    results, _ = several(size)
    for other in results[1:]:
        for key, values in results[0].items():
            for name, value in values.items():
                if isinstance(value, torch.Tensor) and key != ("noises", "own"):
                    assert torch.equal(value, other[key][name]), (key, name)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_one_process_and_several_resume_each_others_states(several, size):
    results, folder = several(size)
    whole = cases.resumable(None, None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        list(whole.run(4))
        expected = cases.parameters(whole)
        assert error(results[0]["resumed", "soba"], expected) < 1e-10
        back = cases.resumable(None, None)
        back.load_state_dict(mlo.load_checkpoint(folder / "several.pt"))
        list(back.run(2))
        list(whole.run(2))
    assert error(cases.parameters(back), cases.parameters(whole)) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_parameters_are_the_first_process_s_from_the_start(several, size):
    results, _ = several(size)
    expected = {
        f"net.{key}": p.detach() for key, p in cases.bilevel(None)[0].module.named_parameters()
    }
    for found in results:
        assert all(torch.equal(found["begun", ""][key], value) for key, value in expected.items())


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_mistakes_of_several_processes_are_named(several, size):
    for rank, found in enumerate(several(size)[0]):
        said = found["complaints", ""]
        assert "Pass distributed='exact', or 'off'" in said["forgotten"]
        assert "'net': all" in said["all_the_same"] and "'mix': all" in said["all_the_same"]
        assert "needs the same problems on all processes" in said["another_engine"]
        assert f"'net.first' differs between process {rank}" in said["another_state"]


@pytest.mark.slow
def test_noise_is_own_or_shared_and_states_stay_alike(several):
    """Noise is each process's own, or shared; the random states stay alike."""
    first, second = several(2)[0]
    own, other = first["noises", "own"], second["noises", "own"]
    assert not torch.isclose(own["drawn"], other["drawn"]).any()
    # Each of the two steps' noise is replayed for its derivative, and by checks.
    _, times = own["drawn"].unique(dim=0, return_counts=True)
    assert len(times) == 2 and int(times.min()) >= 2
    assert torch.equal(own["state"], other["state"])
    assert torch.equal(first["noises", "shared"]["drawn"], second["noises", "shared"]["drawn"])


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["direct", "cg", "one_step", "unroll"])
def test_final_averages_once_and_is_biased(several, engine):
    for size in (2, 4):
        found = several(size)[0][0]["bias", engine]
        bias = float((found["final"] - found["exact"]).norm() / found["exact"].norm())
        print(f"{size} processes, {engine}: relative difference of final and exact {bias:.3f}")
        assert 1e-3 < bias < 2.0


@pytest.mark.slow
def test_a_sharded_transformer_learns_the_same_weights(several):
    """By `penalty`, in two processes as in one, where the weights do move."""
    found = several(2)[0][0]["sharded transformer", ""]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exact = cases.sharded_transformer(None)
    assert error(found, exact) < 1e-8
    assert float(exact["start"].abs().min()) > 1e-4


@pytest.mark.slow
def test_sharded_parameters_give_the_numbers_of_whole_ones(several):
    """fully_shard on two processes, with finite differences and with exact products."""
    found = several(2)[0][0]
    for engine in cases.sharded_engines():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exact = cases.sharded(None, engine)
        got = {key: value for key, value in found["sharded", engine].items() if key in exact}
        assert error(got, exact) < 1e-10, engine
        assert "torch.distributed.checkpoint" in found["sharded", engine]["refused state"]
    final, alone, clipped = found["refused sharding", ""]["said"]
    assert "Pass distributed='exact'" in final and "Pass distributed='exact'" in alone
    assert "grad_clip" in clipped


# ------------------------------ in one process


def test_in_a_single_process_the_option_changes_nothing():
    first, second = (
        cases.run_graph("bilevel", "one_step", None, choice) for choice in (None, "exact")
    )
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: mlo.DataParallel(sync="often"), "sync must be one of exact, final"),
        (lambda: mlo.DataParallel(noise="none"), "noise must be one of own, shared"),
        (
            lambda: mlo.MultilevelOptimizer(cases.bilevel(None), distributed="always"),
            "'exact', 'final', 'off'",
        ),
        (
            lambda: mlo.MultilevelOptimizer(cases.bilevel(None), distributed=2),
            "a mode or a DataParallel, got 2",
        ),
    ],
)
def test_wrong_options_are_named(make, words):
    with pytest.raises(mlo.ConfigurationError, match=words):
        make()


def test_several_processes_without_a_group_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(mlo.ConfigurationError, match="init_process_group"):
        mlo.MultilevelOptimizer(cases.bilevel(None), distributed="exact")


def test_a_batch_is_divided_by_rows():
    batch = {"x": torch.arange(8), "rest": [torch.ones(4, 2), "name"]}
    parts = [_rows(batch, rank, 4) for rank in range(4)]
    assert torch.equal(torch.cat([part["x"] for part in parts]), batch["x"])
    assert parts[3]["rest"][0].shape == (1, 2) and parts[3]["rest"][1] == "name"
    with pytest.raises(mlo.ConfigurationError, match="cannot be divided equally among 3"):
        _rows(batch, 0, 3)


@pytest.mark.parametrize("training", [True, False])
def test_sync_batchnorm_alone_is_batchnorm(training):
    torch.manual_seed(0)
    plain = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 1), torch.nn.BatchNorm2d(3)).train(training)
    synced = SyncBatchNorm.convert(copy.deepcopy(plain))
    x = torch.randn(4, 2, 5, 5)
    assert torch.equal(plain(x), synced(x))
    assert list(plain.state_dict()) == list(synced.state_dict())
    assert all(
        torch.equal(a, b)
        for a, b in zip(plain.state_dict().values(), synced.state_dict().values(), strict=True)
    )
