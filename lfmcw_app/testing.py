"""Contracts for your own primitives, spaces and generators. Test classes inherit them.

@pytest.mark.parametrize("primitive", ["my_primitive"])
class TestMine(PrimitiveContract): ...
"""

from __future__ import annotations

import itertools
import math
from dataclasses import asdict

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lfmcw_app.build_modules import SearchModules, build_modules
from lfmcw_app.data import Dataset, Images
from lfmcw_app.generators import GAMES
from lfmcw_app.plain_yaml import parse_yaml
from lfmcw_app.problems import build_search
from lfmcw_app.recipe import Recipe
from lfmcw_app.recipe_loading import load_recipe, validate_recipe
from lfmcw_app.search_space.batched_operations import Bank, SharedMaps, make_gain_norm
from lfmcw_app.search_space.cost import network_cost
from lfmcw_app.search_space.genotype import Edge, Genotype
from lfmcw_app.search_space.layers import OperationStyle
from lfmcw_app.search_space.network import DerivedNetwork
from lfmcw_app.search_space.operations import PRIMITIVES, make_operation
from lfmcw_app.search_space.supernet import Architecture, Supernet
from lfmcw_app.spaces import SPACES
from mlo import MultilevelOptimizer

__all__ = ["GeneratorContract", "PrimitiveContract", "SpaceContract", "noise_dataset"]

STYLES = tuple(OperationStyle(norm=norm) for norm in ("batch", "group", "instance", "none"))


def noise_dataset(
    classes: int = 3, size: int = 8, channels: int = 1, per_class: int = 8
) -> Dataset:
    """Noise as a data set, for tests."""
    count = classes * per_class
    generator = torch.Generator().manual_seed(0)
    shape = (count, channels, size, size)
    pixels = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    images = Images(pixels=pixels, labels=torch.arange(count) % classes)
    return Dataset(
        name="noise",
        train=images,
        test=images,
        class_names=tuple(f"class {label}" for label in range(classes)),
        mean=(0.5,) * channels,
        std=(0.25,) * channels,
    )


class PrimitiveContract:
    """Holds for every primitive except `none`; parametrised by its name, `primitive`."""

    def test_it_keeps_or_halves_the_resolution(self, primitive: str) -> None:
        """[B, C, H, W] → [B, C, H/s, W/s], for every norm, on one edge and on three."""
        x = torch.randn(2, 4, 8, 8)
        for stride, style in itertools.product((1, 2), STYLES):
            out = make_operation(primitive, 4, stride, style)(x)
            assert out.shape == (2, 4, 8 // stride, 8 // stride)
            assert out.isfinite().all()
            made = PRIMITIVES[primitive].in_supernet(4, 3, stride, style)
            shared = isinstance(made, SharedMaps)
            assert shared or made.reads in ("state", "activated", "repeated")
            given = x.repeat(1, 3, 1, 1) if not shared and made.reads == "repeated" else x
            maps = made(given) if shared else made(given, torch.ones(12))
            assert maps.shape == (2, 4 if shared else 12, 8 // stride, 8 // stride)

    def test_it_leaves_its_input_as_it_was(self, primitive: str) -> None:
        """Several edges read one state."""
        x = torch.randn(2, 4, 8, 8)
        before = x.clone()
        for stride in (1, 2):
            make_operation(primitive, 4, stride, OperationStyle())(x)
        assert torch.equal(x, before)

    def test_mixing_weights_scale_it(self, primitive: str) -> None:
        """Twice the mixing weight gives twice the maps of a cell that has only this operation."""
        torch.manual_seed(0)
        network = _supernet((primitive,)).double()
        cell = network.cells[0]
        x = torch.randn(2, 12, 8, 8, dtype=torch.float64)
        weights = torch.ones(2, 1, dtype=torch.float64)
        torch.manual_seed(1)
        once = cell(x, x, weights)
        torch.manual_seed(1)
        torch.testing.assert_close(cell(x, x, 2.0 * weights), 2.0 * once)

    def test_its_bank_is_its_layer_on_each_edge(self, primitive: str) -> None:
        """With the same weights, on all edges together and on one edge after the other."""
        state = torch.randn(2, 4, 8, 8, dtype=torch.float64)
        gain = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
        for stride, style in itertools.product((1, 2), STYLES):
            made = PRIMITIVES[primitive].in_supernet(4, 3, stride, style).double()
            layers = [make_operation(primitive, 4, stride, style).double() for _ in range(3)]
            if isinstance(made, SharedMaps):
                # In a supernet a norm may follow, since pools win by the scale of their maps.
                alone = layers[0](state)
                assert not list(made.parameters())
                plain, normed = alone, make_gain_norm(style, 4, 1).double()(alone)
                found = made(state)
                assert torch.allclose(found, plain) or torch.allclose(found, normed)
                continue
            _set_weights(made, layers)
            torch.manual_seed(1)
            found = made(_given(made, state, 3, style), gain.repeat_interleave(4))
            torch.manual_seed(1)
            expected = [weight * layer(state) for weight, layer in zip(gain, layers, strict=True)]
            torch.testing.assert_close(found, torch.cat(expected, dim=1))

    def test_its_second_derivatives_are_right(self, primitive: str) -> None:
        """Those of the bank in the state, the mixing weights and its weights; by differences."""
        style = OperationStyle(activation="silu")
        made = PRIMITIVES[primitive].in_supernet(2, 2, 1, style).double()
        names = [name for name, _ in made.named_parameters()]

        def maps(state: Tensor, gain: Tensor, *weights: Tensor) -> Tensor:
            torch.manual_seed(1)
            given = _given(made, state, 2, style)
            args = (given,) if isinstance(made, SharedMaps) else (given, gain)
            found = functional_call(made, dict(zip(names, weights, strict=True)), args)
            # Something to differentiate, in case the maps do not depend on it.
            smooth: Tensor = found + state.mean() ** 3 + gain.mean() ** 3
            return smooth

        torch.manual_seed(0)
        drawn = torch.randn(2, 2, 4, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
        inputs = [tensor.detach().clone() for tensor in (*drawn, *made.parameters())]
        assert torch.autograd.gradgradcheck(
            maps, tuple(tensor.requires_grad_() for tensor in inputs), fast_mode=True
        )

    def test_it_draws_random_numbers_if_it_says_so(self, primitive: str) -> None:
        """Processes that share a batch must know."""
        layer, x = make_operation(primitive, 4, 1, OperationStyle()), torch.randn(2, 4, 8, 8)
        assert torch.equal(layer(x), layer(x)) != PRIMITIVES[primitive].draws

    def test_supernets_of_it_are_differentiable_twice(self, primitive: str) -> None:
        """The product of the Hessian in α is finite, as second-order searches need it."""
        torch.manual_seed(0)
        names = (primitive, "skip_connect") if primitive != "skip_connect" else ("none", primitive)
        network, arch = _supernet(names).double(), Architecture(1, names, scale=0.5).double()
        images = torch.randn(3, 1, 8, 8, dtype=torch.float64)
        parameters = list(arch.parameters())
        logits = network(images, arch())
        loss = nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2]))
        first = torch.autograd.grad(loss, parameters, create_graph=True)
        square = torch.stack([gradient.square().sum() for gradient in first]).sum()
        product = torch.autograd.grad(square, parameters)
        assert all(bool(part.isfinite().all()) for part in product)

    def test_a_network_of_it_learns_a_step(self, primitive: str) -> None:
        """The network of a genotype with only this primitive has parameters that move."""
        torch.manual_seed(0)
        cell = (Edge(primitive, 0), Edge(primitive, 1))
        genotype = Genotype(normal=cell, reduction=cell)
        assert Genotype.from_json(genotype.to_json()) == genotype
        network = DerivedNetwork(genotype, in_channels=1, num_classes=3, channels=4, layers=3)
        before = [parameter.detach().clone() for parameter in network.parameters()]
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        logits, _ = network(torch.randn(4, 1, 8, 8))
        loss = nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 0]))
        trained = list(network.parameters())
        gradients = torch.autograd.grad(loss, trained, allow_unused=True)
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        assert any(
            not torch.equal(old, new) for old, new in zip(before, network.parameters(), strict=True)
        )

    def test_its_cost_can_be_counted_without_computing(self, primitive: str) -> None:
        """Budgets and sizes are counted on layers that hold no numbers."""
        for stride in (1, 2):
            with torch.device("meta"):
                layer = make_operation(primitive, 4, stride, OperationStyle(affine=True))
            cost = network_cost(layer, 8, 4)
            parameters = sum(parameter.numel() for parameter in layer.parameters())
            assert cost.parameters == parameters / 1e6
            assert min(cost.multiply_adds, cost.elementwise) >= 0.0
            assert cost.multiply_adds > 0.0 or not parameters

    def test_it_has_a_colour(self, primitive: str) -> None:
        """For pictures and the report."""
        entry = PRIMITIVES[primitive]
        for colour in (entry.colour, entry.dark_colour or entry.colour):
            assert len(colour) == 7 and colour.startswith("#")
            int(colour[1:], 16)


def _search(recipe: Recipe) -> tuple[MultilevelOptimizer, SearchModules]:
    """A search on noise."""
    torch.manual_seed(0)
    dataset = noise_dataset()
    modules = build_modules(recipe.search, dataset, layers=3)
    return build_search(recipe, dataset, dataset.train, dataset.test, modules), modules


def _values(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.named_parameters()}


def _set_weights(bank: Bank, layers: list[nn.Module]) -> None:
    """Gives a bank the weights of layers: as many tensors, of all edges below one another."""
    own = list(bank.parameters())
    of_layers = [list(layer.parameters()) for layer in layers]
    count = len(of_layers[0])
    assert len(own) in (count, count * len(layers)), (
        "a bank has the weights of its layers: one below another in each of its own, or one after "
        f"another; got {len(own)} for {len(layers)} layers of {count}"
    )
    with torch.no_grad():
        if len(own) == count:
            for parameter, parts in zip(own, zip(*of_layers, strict=True), strict=True):
                parameter.copy_(torch.cat(parts))
        else:
            for parameter, part in zip(own, itertools.chain(*of_layers), strict=True):
                parameter.copy_(part)


def _given(made: Bank | SharedMaps, state: Tensor, edges: int, style: OperationStyle) -> Tensor:
    """What a bank reads of a state."""
    if isinstance(made, SharedMaps) or made.reads == "state":
        return state
    activated: Tensor = style.make_activation()(state)
    return activated if made.reads == "activated" else activated.repeat(1, edges, 1, 1)


def _supernet(primitives: tuple[str, ...]) -> Supernet:
    return Supernet(
        in_channels=1, num_classes=3, channels=4, layers=3, nodes=1, primitives=primitives
    )


class SpaceContract:
    """Holds for every space; parametrised by its name, `space`."""

    def recipe(self, space: str) -> Recipe:
        """A small recipe of the space."""
        changes = {
            "search.method": "darts",
            "search.nodes": 4,
            "search.batch_size": 4,
            "search.architecture.warmup_epochs": 0,
        }
        return load_recipe("smoke", space=space, overrides=changes)

    def test_stages_have_names_of_their_own(self, space: str) -> None:
        """They are the names of checkpoints."""
        names = [stage.name for stage in SPACES[space].stages(self.recipe(space).search)]
        assert len(set(names)) == len(names) > 0

    def test_a_cell_is_derived_from_its_first_and_last_stage(self, space: str) -> None:
        """The genotype has operations that were candidates, and is a function of the weights."""
        torch.manual_seed(0)
        how, entry = self.recipe(space).search, SPACES[space]
        candidates = entry.candidates(how)
        for stage in entry.stages(how):
            arch = entry.architecture(how, candidates)
            found, candidates = candidates, entry.surviving(arch(), candidates, stage)
        genotype = entry.derive(how, arch(), found)
        assert genotype == entry.derive(how, arch(), found)
        assert entry.genotype.from_text(genotype.to_json()) == genotype
        assert entry.genotype.from_text(genotype.notation()) == genotype
        edges = itertools.chain.from_iterable(asdict(found).values())
        assert genotype.primitives <= set(itertools.chain.from_iterable(edges))

    def test_supernet_and_architecture_fit_each_other(self, space: str) -> None:
        """Logits are finite, and differentiable in weights and architecture."""
        torch.manual_seed(0)
        how, entry = self.recipe(space).search, SPACES[space]
        stage, candidates = entry.stages(how)[0], entry.candidates(how)
        network = entry.supernet(
            how, candidates, layers=3, in_channels=1, num_classes=3, style=OperationStyle()
        )
        arch = entry.architecture(how, candidates)
        assert stage.layers >= 3
        logits = network(torch.randn(2, 1, 8, 8), arch())
        assert logits.shape == (2, 3)
        gradients = torch.autograd.grad(logits.square().sum(), list(arch.parameters()))
        assert all(bool(gradient.isfinite().all()) for gradient in gradients)

    def test_a_round_of_its_search_moves_the_architecture(self, space: str) -> None:
        """With gradients through the weights, as a search has it."""
        optimizer, modules = _search(self.recipe(space))
        before = [parameter.detach().clone() for parameter in modules.arch.parameters()]
        record = optimizer.step()
        assert math.isfinite(record.losses["arch"])
        after = list(modules.arch.parameters())
        assert not any(map(torch.equal, before, after))

    def test_recipes_of_it_can_be_written_and_read(self, space: str) -> None:
        """A run is resumed from its recipe."""
        recipe = self.recipe(space)
        assert validate_recipe(parse_yaml(recipe.to_yaml())) == recipe

    def test_random_cells_are_a_function_of_the_seed(self, space: str) -> None:
        """And have a network."""
        how, entry = self.recipe(space).search, SPACES[space]
        genotype = entry.random(how, 3)
        assert genotype == entry.random(how, 3)
        network = entry.network(genotype, in_channels=1, num_classes=3, channels=4, layers=3)
        logits, _ = network.eval()(torch.randn(2, 1, 8, 8))
        assert logits.shape == (2, 3)

    def test_it_has_a_title(self, space: str) -> None:
        """For reports."""
        assert SPACES[space].title


class GeneratorContract:
    """Holds for every generator and its game; parametrised by its name, `generator`."""

    def test_images_are_those_of_the_labels_size(self, generator: str) -> None:
        """[B, C, H, W], differentiable in the weights, finite."""
        torch.manual_seed(0)
        made = GAMES[generator].generator(
            num_classes=3, image_size=8, image_channels=1, mean=(0.5,), std=(0.25,), noise_dim=8,
            channels=4,
        )  # fmt: skip
        images = made.sample(torch.tensor([0, 1, 2, 2]))
        assert images.shape == (4, 1, 8, 8)
        trained = [parameter for parameter in made.parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad(images.square().sum(), trained, allow_unused=True)
        assert any(gradient is not None for gradient in gradients)
        assert bool(images.isfinite().all())

    def test_a_round_of_its_game_moves_both_players(self, generator: str) -> None:
        """Against a discriminator with the searched architecture, in a search."""
        changes = {
            "search.generator.name": generator,
            "search.batch_size": 4,
            "search.nodes": 1,
            "search.primitives": ["skip_connect", "sep_conv_3x3"],
        }
        optimizer, modules = _search(load_recipe("smoke", overrides=changes))
        gan = modules.gan
        assert gan is not None
        players = {"generator": gan.generator, "discriminator": gan.discriminator}
        before = {name: _values(player) for name, player in players.items()}
        record = optimizer.step()
        for name, player in players.items():
            assert math.isfinite(record.losses["gan"][name])
            after = _values(player)
            assert any(not torch.equal(value, after[key]) for key, value in before[name].items())

    def test_its_game_has_norms_that_its_trunk_may_have(self, generator: str) -> None:
        """The first one is recommended."""
        assert GAMES[generator].trunk_norms
        assert GAMES[generator].head in ("flatten", "sum")
