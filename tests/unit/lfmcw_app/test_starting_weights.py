"""Starting weights: what is loaded is that of the other run, and what does not fit is named."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from rich.console import Console

import mlo
from lfmcw_app.batchnorm import give_statistics
from lfmcw_app.build_modules import build_modules
from lfmcw_app.data import load_dataset
from lfmcw_app.errors import InputError
from lfmcw_app.fingerprint import Fingerprint
from lfmcw_app.generator_warmup import build_warmup
from lfmcw_app.network_file import NetworkFile, NetworkPlan
from lfmcw_app.pictures import describe_dataset
from lfmcw_app.recipe_loading import load_recipe
from lfmcw_app.run_folder import RunFolder
from lfmcw_app.search import search
from lfmcw_app.search_space.genotype import random_genotype
from lfmcw_app.stages import WARMUP
from lfmcw_app.starting_weights import (
    averaged_generator,
    check_generator_fits,
    check_network_fits,
    check_supernets_fit,
    generator_weights,
    load_into_generator,
    load_into_network,
    load_into_supernets,
    weights_digest,
    with_digests,
)

GENOTYPE = random_genotype(2, 0)
SMALL = {
    "dataset": "digits",
    "search.channels": 4,
    "search.nodes": 1,
    "search.generator.channels": 2,
    "search.generator.noise_dim": 4,
    "evaluation.channels": 2,
}


def recipe(**changes):
    return load_recipe("smoke", overrides=SMALL | changes)


def digits(*, classes=None):
    """The data set, or one that says it has other classes."""
    dataset = load_dataset("digits")
    return dataset if classes is None else replace(dataset, class_names=classes)


# ------------------------------ the derived network


@pytest.fixture
def trained(tmp_path):
    """A run folder with a network.pt, and its weights."""
    dataset = digits()
    plan = NetworkPlan.of(recipe(), GENOTYPE, dataset)
    torch.manual_seed(7)
    weights = plan.build().state_dict()
    about = {
        "dataset": "digits", "test_error_percent": 2.5, "test_images": 10, "seed": 0,
        "recipe_sha256": "", "versions": {},
    }  # fmt: skip
    NetworkFile(
        plan=plan, weights=weights, class_names=dataset.class_names, mean=dataset.mean,
        std=dataset.std, decoding=dataset.decoding, about=about,
    ).save(tmp_path / "network.pt")  # fmt: skip
    return tmp_path, weights


def started(folder, dataset, **changes):
    """The weights that a training begins with."""
    made = with_digests(recipe(**{"evaluation.init.run": str(folder)}, **changes))
    torch.manual_seed(0)
    auxiliary = made.evaluation.auxiliary_weight > 0
    network = NetworkPlan.of(made, GENOTYPE, dataset).build(auxiliary=auxiliary)
    own = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    load_into_network(network, made, dataset)
    return network.state_dict(), own


def test_a_training_begins_with_all_weights_of_the_run(trained):
    folder, weights = trained
    found, own = started(folder, digits())
    assert set(found) == set(weights)
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    assert not torch.equal(own["classifier.weight"], weights["classifier.weight"])


@pytest.mark.parametrize(
    "classes", [("a", "b", "c"), tuple("abcdefghij")], ids=["other number", "other names"]
)
def test_a_classifier_of_other_classes_is_not_taken(trained, classes):
    folder, weights = trained
    dataset = digits(classes=classes)
    found, own = started(folder, dataset)
    for name in found:
        expected = own if name.startswith("classifier.") else weights
        assert torch.equal(found[name], expected[name])
    made = with_digests(recipe(**{"evaluation.init.run": str(folder)}))
    told = check_network_fits(made, GENOTYPE, dataset)
    assert f"a new classifier for {len(classes)} classes" in told
    assert "its classifier too" in check_network_fits(made, GENOTYPE, digits())


def test_an_auxiliary_head_keeps_its_own_weights(trained):
    found, own = started(trained[0], digits(), **{"evaluation.auxiliary_weight": 0.4})
    heads = [name for name in found if name.startswith("auxiliary.")]
    assert heads
    assert all(torch.equal(found[name], own[name]) for name in heads)


@pytest.mark.parametrize(
    ("changes", "genotype", "message"),
    [
        ({"evaluation.channels": 4}, GENOTYPE, "evaluation.channels is 4 here, but 2 there"),
        ({"evaluation.layers": 4}, GENOTYPE, "evaluation.layers is 4 here, but 3 there"),
        ({"evaluation.stem": "imagenet"}, GENOTYPE, "evaluation.stem is imagenet"),
        ({}, random_genotype(2, 1), "does not have the cells.*lfmcw_app.evaluate"),
    ],
)
def test_a_network_that_does_not_fit_is_refused_by_name(trained, changes, genotype, message):
    made = with_digests(recipe(**{"evaluation.init.run": str(trained[0])}, **changes))
    with pytest.raises(InputError, match=message):
        check_network_fits(made, genotype, digits())


def test_images_with_other_channels_are_refused(trained):
    made = with_digests(recipe(**{"evaluation.init.run": str(trained[0])}))
    dataset = load_dataset("random:cifar10", image_size=8)
    with pytest.raises(InputError, match=r"channels of an image.* is 3 here, but 1 there"):
        check_network_fits(made, GENOTYPE, dataset)


def test_what_does_not_fit_changes_nothing(trained):
    """Also where the comparison of plans was left out: all weights are loaded, or none."""
    made = with_digests(recipe(**{"evaluation.init.run": str(trained[0])}))
    network = NetworkPlan.of(recipe(**{"evaluation.channels": 4}), GENOTYPE, digits()).build()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(InputError, match=r"cells\.0.*has the shape .* there, and here it has"):
        load_into_network(network, made, digits())
    assert all(torch.equal(before[name], t) for name, t in network.state_dict().items())


def test_the_recipe_holds_the_digest_and_refuses_other_weights(trained):
    folder, weights = trained
    made = with_digests(recipe(**{"evaluation.init.run": str(folder)}))
    assert made.evaluation.init.digest == weights_digest(weights)
    assert with_digests(made) == made

    file = NetworkFile.load(folder / "network.pt")
    changed = {**file.weights, "classifier.bias": file.weights["classifier.bias"] + 1e-3}
    replace(file, weights=changed).save(folder / "network.pt")
    with pytest.raises(InputError, match=r"are not those of the recipe: evaluation.init.digest"):
        with_digests(made)
    with pytest.raises(InputError, match="are not those of the recipe"):
        check_network_fits(made, GENOTYPE, digits())
    with pytest.raises(InputError, match="are not those of the recipe"):
        load_into_network(file.network(), made, digits())


def test_without_a_run_nothing_is_loaded():
    assert with_digests(recipe()) == recipe()
    assert check_network_fits(recipe(), GENOTYPE, digits()) == ""
    assert check_supernets_fit(recipe(), digits()) == ""


def test_a_run_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(InputError, match="no run folder"):
        with_digests(recipe(**{"evaluation.init.run": str(tmp_path / "none")}))
    with pytest.raises(InputError, match="has no search to take weights from"):
        with_digests(recipe(**{"search.init.run": str(tmp_path)}))
    with pytest.raises(InputError, match="digest needs run"):
        recipe(**{"evaluation.init.digest": "ab"})


def test_a_digest_depends_on_names_shapes_types_and_values():
    weights = {"a": torch.arange(6.0), "b": torch.tensor(1)}
    same = {"b": torch.tensor(1), "a": torch.arange(6.0)}
    others = [
        {"a": torch.arange(6.0), "c": torch.tensor(1)},
        {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(1)},
        {"a": torch.arange(6.0).int(), "b": torch.tensor(1)},
        {"a": torch.arange(6.0) + 1e-6, "b": torch.tensor(1)},
    ]
    assert weights_digest(same) == weights_digest(weights)
    assert len({weights_digest(tensors) for tensors in [weights, *others]}) == 5


# ------------------------------ supernets


def searched(folder, made, dataset, *, name="search"):
    """Writes the checkpoint of a search; returns its modules."""
    torch.manual_seed(7)
    modules = build_modules(made.search, dataset)
    problems = {
        problem: {"module": module.state_dict()}
        for problem, module in modules._asdict().items()
        if module is not None
    }
    state = {"optimizer": {"problems": problems}}
    mlo.CheckpointStore(folder, name).save(state)
    return modules


def equal(first, second, *, but=()):
    weights = second.state_dict()
    return all(
        torch.equal(tensor, weights[name])
        for name, tensor in first.state_dict().items()
        if not name.startswith(but or ("\0",))
    )


@pytest.mark.parametrize("name", ["search", "search-1"])
@pytest.mark.parametrize("method", ["lfmcw", "darts"])
def test_a_search_begins_with_the_supernets_of_the_run(tmp_path, name, method):
    """W1 takes its own where there is one, else W2's; the other modules are their own."""
    theirs = searched(tmp_path, recipe(**{"search.method": method}), digits(), name=name)
    made = with_digests(recipe(**{"search.init.run": str(tmp_path)}))
    modules = build_modules(made.search, digits())
    assert "their classifiers too" in load_into_supernets(modules, made)
    assert equal(modules.w2.network, theirs.w2.network)
    assert equal(modules.w1, theirs.w2.network if theirs.w1 is None else theirs.w1)
    assert not equal(modules.arch, theirs.arch)
    assert theirs.gan is None or not equal(modules.gan, theirs.gan)


def test_supernets_of_an_earlier_version_give_their_weights(tmp_path):
    """They kept running statistics, which are in the digest and are not taken."""
    made = recipe()
    torch.manual_seed(7)
    theirs = build_modules(made.search, digits())
    own = theirs.w2.network.state_dict()
    for network in (theirs.w1, theirs.w2):
        give_statistics(network)
    problems = {name: {"module": getattr(theirs, name).state_dict()} for name in ("w1", "w2")}
    mlo.CheckpointStore(tmp_path, "search").save({"optimizer": {"problems": problems}})
    made = with_digests(recipe(**{"search.init.run": str(tmp_path)}))
    modules = build_modules(made.search, digits())
    load_into_supernets(modules, made)
    assert modules.w2.network.state_dict().keys() == own.keys()
    assert equal(modules.w2.network, theirs.w2.network)
    assert equal(modules.w1, theirs.w1)


def test_supernets_for_other_classes_have_new_classifiers(tmp_path):
    theirs = searched(tmp_path, recipe(), digits())
    made = with_digests(recipe(**{"search.init.run": str(tmp_path)}))
    dataset = digits(classes=("a", "b", "c"))
    assert "new classifiers" in check_supernets_fit(made, dataset)
    modules = build_modules(made.search, dataset)
    load_into_supernets(modules, made)
    assert equal(modules.w2.network, theirs.w2.network, but=("classifier.",))


def test_supernets_that_do_not_fit_are_refused_by_name(tmp_path):
    searched(tmp_path, recipe(), digits())
    for key, value in (("search.channels", 8), ("search.layers", 4), ("search.nodes", 2)):
        made = with_digests(recipe(**{"search.init.run": str(tmp_path), key: value}))
        with pytest.raises(InputError, match=r"do not fit: .*Channels, layers, nodes, stem"):
            check_supernets_fit(made, digits())


def test_checking_draws_no_random_numbers(tmp_path):
    searched(tmp_path, recipe(), digits())
    made = with_digests(recipe(**{"search.init.run": str(tmp_path)}))
    before = torch.get_rng_state()
    check_supernets_fit(made, digits())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_search_refuses_a_network_to_start_from(trained):
    made = with_digests(recipe(**{"evaluation.init.run": str(trained[0])}))
    with pytest.raises(InputError, match=r"python -m lfmcw_app.evaluate"):
        check_supernets_fit(made, digits())


@pytest.mark.parametrize("state", [{}, {"optimizer": 3}, {"optimizer": {"problems": {"w2": 1}}}])
def test_a_checkpoint_without_supernets_is_refused(tmp_path, state):
    mlo.CheckpointStore(tmp_path, "search").save(state)
    with pytest.raises(InputError, match="holds no weights of supernets"):
        with_digests(recipe(**{"search.init.run": str(tmp_path)}))


# ------------------------------ the generator


WARM = {
    "search.generator.warmup_rounds": 3,
    "search.generator.warmup_discriminator_channels": 2,
    "search.batch_size": 8,
    "data.search_images": 80,
}


def warmed(folder, *, rounds=3, dataset=None, **changes):
    """Writes what a run has after `rounds` rounds of its warm-up; returns the generator's state."""
    dataset = dataset or digits()
    made = recipe(**WARM, **changes)
    torch.manual_seed(5)
    optimizer = build_warmup(made, dataset, dataset.train)
    for _ in range(rounds):
        optimizer.step()
    folder.mkdir(exist_ok=True)
    run = RunFolder.create(folder, made)
    describe_dataset(dataset, run)
    run.save(WARMUP, optimizer, {})
    return averaged_generator(optimizer.problems["gan"].module.state_dict())


def taking(folder, **changes):
    return with_digests(recipe(**{"search.generator.init.run": str(folder)}, **changes))


def test_a_generator_is_taken_with_its_average(tmp_path):
    weights = warmed(tmp_path)
    made = taking(tmp_path, **WARM)
    assert made.search.generator.init.digest == weights_digest(weights)
    told = check_generator_fits(made, digits())
    assert made.search.generator.init.digest in told
    assert "3 rounds of warm-up" in told
    generator = build_modules(made.search, digits()).gan.generator
    load_into_generator(generator, generator_weights(made.search.generator.init), "there")
    found = generator.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())


HALF = {"of": "3", "as": ["8"], "share": 0.5}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "seed is 1 here, but 0 there"),
        ({"data.search_images": 90}, "search_images is 90 here, but 80 there"),
        ({"data.search_fractions": [0.6, 0.4]}, "search_fractions"),
        ({"data.imbalance": 0.2}, "imbalance is 0.2 here, but None there"),
        ({"data.class_shares": {"3": 0.5}}, "class_shares"),
        ({"data.wrong_labels": [HALF]}, "wrong_labels"),
    ],
)
def test_a_generator_that_may_know_d_val_is_refused(tmp_path, changes, message):
    """Its warm-up had another D_tr than the search, or other labels there."""
    warmed(tmp_path)
    with pytest.raises(InputError, match=rf"did not learn on this search's D_tr.*{message}"):
        check_generator_fits(taking(tmp_path, **(WARM | changes)), digits())


def test_labels_wrong_in_d_val_too_need_no_warm_up_of_their_own(tmp_path):
    warmed(tmp_path, **{"data.wrong_labels": [HALF]})
    both = {"data.wrong_labels": [HALF | {"in": "both"}]}
    assert "3 rounds" in check_generator_fits(taking(tmp_path, **WARM, **both), digits())


def test_a_generator_of_other_data_of_these_classes_is_refused(tmp_path):
    warmed(tmp_path)
    other = replace(digits(), fingerprint=Fingerprint.of_name("other"))
    with pytest.raises(InputError, match="did not learn on digits as it is read"):
        check_generator_fits(taking(tmp_path, **WARM), other)


@pytest.mark.parametrize("changes", [{"data.imbalance": 0.2}, {"search.generator.name": "wgan_gp"}])
def test_a_run_in_a_folder_of_its_own_is_checked_too(tmp_path, changes):
    """A table's run is resumed from its recipe before its first round."""
    changes = {"search.generator.name": "resnet"} | changes
    warmed(tmp_path / "warm", **{"search.generator.name": "resnet"})
    made = taking(tmp_path / "warm", **(WARM | changes | {"search.generator.warmup_rounds": 0}))
    folder = RunFolder.create(tmp_path / "run", made)
    with pytest.raises(InputError, match=r"did not learn on this|generator.name is 'wgan_gp'"):
        search(folder, digits(), Console(quiet=True), torch.device("cpu"))
    assert not folder.metrics.exists()


def test_an_average_of_the_generators_own_begins_anew(tmp_path):
    """BigGAN's: of the weights that were taken, as if they were the initial ones."""
    weights = warmed(tmp_path, **{"search.generator.name": "biggan"})
    made = taking(tmp_path, **{"search.generator.name": "biggan"})
    generator = build_modules(made.search, digits()).gan.generator
    generator.average.updates.fill_(7)
    load_into_generator(generator, weights, "there")
    assert int(generator.average.updates) == 0
    own = dict(generator.named_parameters())
    averages = generator.average.tensors()
    assert all(torch.equal(averages[name], own[name]) for name in own)
    assert all(torch.equal(weights[name], own[name]) for name in own)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"search.generator.name": "wgan_gp"}, "search.generator.name is"),
        ({"search.generator.noise_dim": 8}, "search.generator.noise_dim is 8 here, but 4 there"),
        ({"search.generator.channels": 4}, "search.generator.channels is 4 here, but 2 there"),
    ],
)
def test_a_generator_of_other_settings_is_refused(tmp_path, changes, message):
    warmed(tmp_path)
    with pytest.raises(InputError, match=message):
        check_generator_fits(taking(tmp_path, **changes), digits())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_names": tuple("abcdefghij")}, "the classes is"),
        ({"channels": 3}, r"channels of an image .* is 3 here, but 1 there"),
    ],
)
def test_a_generator_of_other_images_is_refused(tmp_path, changes, message):
    warmed(tmp_path)
    dataset = load_dataset("random:cifar10", image_size=8)
    if "class_names" in changes:
        dataset = digits(classes=changes["class_names"])
    with pytest.raises(InputError, match=message):
        check_generator_fits(taking(tmp_path), dataset)


def test_images_of_another_size_are_refused(tmp_path):
    warmed(tmp_path, dataset=load_dataset("random:cifar10", image_size=8))
    larger = load_dataset("random:cifar10", image_size=16)
    with pytest.raises(InputError, match=r"size of an image .* is 16 here, but 8 there"):
        check_generator_fits(taking(tmp_path), larger)


def test_only_a_complete_warm_up_is_taken(tmp_path):
    with pytest.raises(InputError, match="has no generator to take"):
        taking(tmp_path)
    warmed(tmp_path, rounds=2)
    with pytest.raises(InputError, match=r"has made 2 of its 3 rounds.*--resume"):
        taking(tmp_path)


@pytest.mark.parametrize(
    "state", [{}, {"recipe": "seed: 1"}, {"recipe": "seed: 1", "optimizer": 3}]
)
def test_a_checkpoint_without_a_generator_is_refused(tmp_path, state):
    mlo.CheckpointStore(tmp_path, WARMUP).save(state)
    with pytest.raises(InputError, match="holds no generator"):
        taking(tmp_path)


def test_another_generator_than_the_recipes_is_refused(tmp_path):
    warmed(tmp_path / "one")
    warmed(tmp_path / "two", seed=3)
    digest = taking(tmp_path / "one").search.generator.init.digest
    with pytest.raises(InputError, match=r"search.generator.init.digest is"):
        taking(tmp_path / "two", **{"search.generator.init.digest": digest})


def test_who_takes_a_generator_makes_no_warm_up_unless_asked(tmp_path):
    preset = {"search": {"generator": {"init": {"run": "there"}}}}

    def rounds(config, **given):
        made = load_recipe("small", config=config, overrides={"dataset": "digits", **given})
        return made.search.generator.warmup_rounds

    assert rounds({}) > 0
    assert rounds(preset) == 0
    assert rounds({}, **{"search.generator.init.run": "there"}) == 0
    assert rounds({}, **{"search.generator.init.run": None}) == rounds({})
    asked = {"search.generator.warmup_rounds": 5}
    assert rounds(preset, **asked) == 5
