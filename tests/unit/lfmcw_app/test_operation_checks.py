"""What is refused of an operation of another package, before a run begins."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lfmcw_app.errors import InputError
from lfmcw_app.operation_checks import check_operations
from lfmcw_app.recipe_loading import load_recipe
from lfmcw_app.search_space.operations import DARTS_PRIMITIVES, PRIMITIVES, Primitive


class Maps(nn.Module):
    """A 1×1 convolution of what a function makes of the maps."""

    def __init__(self, channels, stride, change=lambda module, x: x):
        super().__init__()
        self.convolution = nn.Conv2d(channels, channels, 1, stride, bias=False)
        self.kept = torch.ones(channels, 1, 1)
        self.change = change

    def forward(self, x):
        return self.convolution(self.change(self, x))


SHARED, POOL = nn.Conv2d(4, 4, 1), nn.AvgPool2d(2)

USABLE = {
    "plain": Maps,
    "with_norm": lambda c, s: nn.Sequential(nn.Conv2d(c, c, 1, s), nn.BatchNorm2d(c)),
    "skips": lambda c, s: nn.AvgPool2d(s),
    "windows_of_7": lambda c, s: Maps(c, s, lambda m, x: x.reshape(*x.shape[:2], 7, -1)),
    "of_large_maps": lambda c, s: nn.Sequential(nn.ReflectionPad2d(9), nn.Conv2d(c, c, 19, s)),
    "shared_pools": lambda c, s: POOL if s == 2 else Maps(c, s),
}

REFUSED = {
    "a_function": (lambda c, s: F.relu, "must be an nn.Module"),
    "lazy": (lambda c, s: nn.LazyConv2d(c, 1, s), "has lazy parameters"),
    "shared": (lambda c, s: SHARED, "the same module each time"),
    "wider": (lambda c, s: nn.Conv2d(c, 2 * c, 1, s), r"makes torch.float32 \[2, 8, 8, 8\]"),
    "no_stride": (lambda c, s: nn.Conv2d(c, c, 1), r"2\) makes .* \[2, 4, 4, 4\]"),
    "several": (lambda c, s: nn.MaxPool2d(s, return_indices=True), "makes tuple"),
    "half_floats": (lambda c, s: Half(s), "makes torch.float16"),
    "in_place": (lambda c, s: Maps(c, s, lambda m, x: x.mul_(2)), "changes its input in place"),
    "of_batches": (
        lambda c, s: nn.Sequential(Maps(c, s), nn.BatchNorm2d(c, track_running_stats=False)),
        "depends, in evaluation, on the other images of a batch",
    ),
    "noisy": (lambda c, s: Maps(c, s, lambda m, x: x + torch.randn_like(x)), "draws=True"),
    "keeps_a_tensor": (lambda c, s: Maps(c, s, lambda m, x: x * m.kept), "as buffers"),
    "makes_a_tensor": (lambda c, s: Maps(c, s, lambda m, x: x + torch.ones(8)), "x.device"),
    "reads_a_number": (lambda c, s: Maps(c, s, lambda m, x: x * float(x.max())), r"\.item\(\)"),
}


class Half(nn.AvgPool2d):
    def forward(self, x):
        return super().forward(x).half()


@pytest.fixture
def checked(monkeypatch):
    monkeypatch.setattr(PRIMITIVES, "_entries", dict(PRIMITIVES._entries))

    def check(make, space="darts", *, searches=True, **more):
        layer = lambda channels, stride, style: make(channels, stride)  # noqa: E731
        PRIMITIVES.register("mine", Primitive(layer=layer, colour="#000000", **more), replace=True)
        names = {"mine", "none", *DARTS_PRIMITIVES}
        check_operations(names, load_recipe("smoke", space=space), searches=searches)

    return check


@pytest.mark.parametrize("name", USABLE)
def test_an_operation_that_a_run_can_use_is_accepted(name, checked):
    before = torch.get_rng_state()
    checked(USABLE[name])
    assert torch.equal(torch.get_rng_state(), before)  # the run's own numbers stay the same


@pytest.mark.parametrize("name", REFUSED)
def test_an_operation_that_would_end_a_run_is_refused(name, checked):
    make, why = REFUSED[name]
    with pytest.raises(InputError, match=rf"The operation 'mine' \(channels \d, stride.*{why}"):
        checked(make)


def test_a_network_alone_is_tried_at_its_own_channels(checked):
    grouped = lambda c, s: nn.Conv2d(c, c, 1, s, groups=8)  # noqa: E731 - the supernet has 4
    checked(grouped, searches=False)
    with pytest.raises(ValueError, match="divisible by groups"):
        checked(grouped)


def test_noise_may_depend_on_the_draw_if_it_says_so(checked):
    checked(REFUSED["noisy"][0], draws=True)


def test_cells_without_strides_ask_for_none(checked):
    checked(REFUSED["no_stride"][0], space="nasbench201")


def test_an_error_of_the_operations_own_code_names_it(checked):
    with pytest.raises(ZeroDivisionError) as caught:
        checked(lambda c, s: Maps(c, s, lambda m, x: x / (1 // 0)))
    assert caught.value.__notes__[0].startswith("The operation 'mine' (channels 4, stride 1)")


def test_an_operation_in_the_place_of_a_built_in_one_is_checked(checked, monkeypatch):
    entry = Primitive(layer=lambda c, s, style: nn.Conv2d(c, c, 1), colour="#000000")
    monkeypatch.setitem(PRIMITIVES._entries, "sep_conv_3x3", entry)
    with pytest.raises(InputError, match="The operation 'sep_conv_3x3'"):
        checked(Maps)
