"""network.pt: complete, equal to what was tested, and checked whole before it is used."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from rich.console import Console
from trained_runs import copied

import mlo
from lfmcw_app.complete_runs import evaluate_genotype
from lfmcw_app.errors import InputError
from lfmcw_app.network_file import NetworkFile, NetworkPlan
from lfmcw_app.run_files import EVALUATED, NETWORK
from lfmcw_app.run_folder import RunFolder
from lfmcw_app.runs import Run
from lfmcw_app.search_space.genotype import Genotype

CPU = torch.device("cpu")


def changed(path, **changes):
    """The file with other entries; None removes one."""
    state = mlo.load_checkpoint(path)
    for key, value in changes.items():
        state[key] = value
        if value is None:
            del state[key]
    mlo.save_checkpoint(state, path)


@pytest.fixture
def file(trained, tmp_path):
    return copied(trained, tmp_path) / NETWORK


def test_the_file_says_all_that_is_needed(trained):
    file = NetworkFile.load(trained.path / NETWORK)
    result = json.loads((trained.path / "result.json").read_text("utf-8"))
    assert file.class_names == trained.dataset.class_names == ("T-shirt $5", "cat", "dog")
    assert file.mean == trained.dataset.mean
    assert file.std == trained.dataset.std
    assert file.decoding == trained.dataset.decoding
    assert file.plan.genotype == Genotype.load(trained.path / EVALUATED)
    assert file.about["test_error_percent"] == result["test_error_percent"]
    assert file.about["versions"]["torch"] == str(torch.__version__)


def test_the_weights_are_those_that_were_tested(trained):
    """The running statistics too, which the test computes anew."""
    (network,) = trained.networks
    tested = network.state_dict()
    weights = NetworkFile.load(trained.path / NETWORK).network().state_dict()
    assert weights
    assert all(torch.equal(value, tested[name]) for name, value in weights.items())
    left = set(tested) - set(weights)
    assert left
    assert all(name.startswith("auxiliary.") for name in left)
    checkpoint = mlo.load_checkpoint(trained.path / "training.pt")
    before = checkpoint["optimizer"]["problems"]["network"]["module"]
    running = [name for name in weights if name.endswith("running_var")]
    assert not any(torch.equal(weights[name], before[name]) for name in running)


def test_reading_draws_no_random_number(trained):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    NetworkFile.load(trained.path / NETWORK).network()
    assert torch.equal(torch.get_rng_state(), state)


def test_reading_leaves_what_another_thread_draws(trained, monkeypatch):
    """Put back, the random states would give a run in that thread the same numbers again."""
    build = NetworkPlan.build

    built = []

    def meanwhile(plan, **options):
        built.append(plan)
        with ThreadPoolExecutor(1) as pool:
            pool.submit(torch.rand, 3).result()
        return build(plan, **options)

    monkeypatch.setattr(NetworkPlan, "build", meanwhile)
    torch.manual_seed(5)
    Run(trained.path).predict(next((trained.pictures / "test").rglob("*.png")))
    found = torch.rand(3)
    torch.manual_seed(5)
    torch.rand(3 * 2)  # it is built once without memory, to be checked, and once more
    assert torch.equal(found, torch.rand(3)) and len(built) == 2


def test_each_network_of_a_file_has_weights_of_its_own(trained):
    file = NetworkFile.load(trained.path / NETWORK)
    one, other = file.network(), file.network()
    expected = NetworkFile.load(trained.path / NETWORK).weights
    with torch.no_grad():
        for tensor in one.state_dict().values():
            tensor.zero_()
    assert all(map(torch.equal, other.state_dict().values(), expected.values()))
    assert all(parameter.requires_grad for parameter in other.parameters())


@pytest.mark.parametrize("kind", ["buffer", "attribute"])
def test_tensors_that_are_in_no_file_have_their_values(kind, trained, monkeypatch):
    """Operations of plugins may have some; no random number is drawn for them either."""
    build = NetworkPlan.build

    def with_tensor(plan, **options):
        network = build(plan, **options)
        if kind == "buffer":
            network.register_buffer("scale", torch.full((2,), 3.0), persistent=False)
        else:
            network.scale = torch.full((2,), 3.0)
        return network

    monkeypatch.setattr(NetworkPlan, "build", with_tensor)
    state = torch.get_rng_state()
    file = NetworkFile.load(trained.path / NETWORK)
    network = file.network()
    assert torch.equal(network.scale, torch.tensor([3.0, 3.0]))
    assert all(map(torch.equal, network.state_dict().values(), file.weights.values()))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_complete_run_without_the_file_makes_it(trained, tmp_path):
    """From its last checkpoint; without one, the result stays as it is."""
    path = copied(trained, tmp_path)
    expected = (path / "result.json").read_text("utf-8")
    weights = NetworkFile.load(path / NETWORK).weights
    arguments = Genotype.load(path / EVALUATED), trained.dataset, Console(quiet=True), CPU
    (path / NETWORK).unlink()
    evaluate_genotype(RunFolder.open(path), *arguments)
    made = NetworkFile.load(path / NETWORK).weights
    assert all(torch.equal(made[name], value) for name, value in weights.items())
    assert (path / "result.json").read_text("utf-8") == expected

    (path / NETWORK).unlink()
    for checkpoint in path.glob("training*.pt"):
        checkpoint.unlink()
    assert evaluate_genotype(RunFolder.open(path), *arguments) == json.loads(expected)
    assert not (path / NETWORK).exists()


# ------------------------------ what is refused


def without_one(weights):
    return dict(list(weights.items())[1:])


def with_one(weights, change):
    name = next(name for name in weights if name.endswith("classifier.weight"))
    return {**weights, name: change(weights[name])}


@pytest.mark.parametrize(
    ("entry", "change", "words"),
    [
        ("format", lambda _: "other", "does not hold a trained network"),
        ("version", lambda _: 2, "has version 2 of its format"),
        ("version", lambda _: None, "has version None"),
        ("genotype", lambda _: {"normal": []}, "the keys 'normal' and 'reduction'"),
        ("genotype", lambda _: 3, "genotype: Input should be a valid dictionary"),
        ("primitives", lambda names: [*names, "my_conv"], "the operation 'my_conv'"),
        ("channels", lambda _: 3, "instead of"),
        ("channels", lambda _: -1, "channels: Input should be greater"),
        ("channels", lambda _: 2.5, "channels: Input should be a valid integer"),
        ("layers", lambda _: 4, "is missing"),
        ("layers", lambda _: 60_000, "60000 layers have only"),
        ("stem", lambda _: "other", "stem: Input should be 'cifar' or 'imagenet'"),
        ("stem", lambda _: "imagenet", "the weight"),
        ("in_channels", lambda _: 1, "one entry per channel"),
        ("class_names", lambda names: names[:2], "instead of"),
        ("class_names", lambda _: [], "class_names: List should have at least 1"),
        ("mean", lambda mean: mean[:2], "one entry per channel"),
        ("mean", lambda mean: [float("nan"), *mean[1:]], "mean.0"),
        ("std", lambda std: [0.0, *std[1:]], "std.0: Input should be greater than 0"),
        ("decoding", lambda _: {"size": "large"}, "decoded"),
        ("about", lambda _: {}, "about.dataset: Field required"),
        ("weights", lambda _: None, "weights: Field required"),
        ("weights", lambda _: {}, "have only 0 weights"),
        ("weights", without_one, "is missing"),
        ("weights", lambda weights: {**weights, "more": torch.ones(1)}, "'more' is none of its"),
        ("weights", lambda weights: with_one(weights, torch.Tensor.double), "torch.float64"),
        ("weights", lambda weights: with_one(weights, lambda x: x[:1]), "instead of"),
        ("weights", lambda weights: with_one(weights, lambda x: x / 0), "is not finite"),
        ("weights", lambda weights: with_one(weights, torch.Tensor.to_sparse), "sparse"),
        ("surprise", lambda _: 1, "surprise: Extra inputs are not permitted"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(entry, change, words, file):
    state = mlo.load_checkpoint(file)
    changed(file, **{entry: change(state.get(entry))})
    with pytest.raises(InputError) as error:
        NetworkFile.load(file)
    assert words in str(error.value)
    assert str(file) in str(error.value)
    assert len(str(error.value)) < 700


def test_a_damaged_file_is_refused(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(mlo.CheckpointError, match="its checksum does not match"):
        NetworkFile.load(file)


def test_another_checkpoint_is_no_network(trained):
    with pytest.raises(InputError, match="does not hold a trained network"):
        NetworkFile.load(trained.path / "training.pt")


def test_a_disk_that_is_full_ends_the_run_with_a_word(trained, tmp_path, monkeypatch):
    """The result is not written then, so that the run is not complete without its network."""
    path = copied(trained, tmp_path)
    for name in (NETWORK, "result.json"):
        (path / name).unlink()

    def full(state, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mlo, "save_checkpoint", full)
    with pytest.raises(InputError, match=f"{NETWORK} cannot be written .*No space left"):
        evaluate_genotype(
            RunFolder.open(path),
            Genotype.load(path / EVALUATED),
            trained.dataset,
            Console(quiet=True),
            CPU,
        )
    assert not (path / "result.json").exists()
    assert not list(Path(path).glob(".network*"))
