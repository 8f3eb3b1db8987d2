"""The schema of a recipe: every setting of a run, with its range and what it must go with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from lfmcw_app.errors import shown
from lfmcw_app.generators import GAMES, REAL
from lfmcw_app.plain_yaml import dump_yaml
from lfmcw_app.search_space.operations import DARTS_PRIMITIVES
from lfmcw_app.spaces import SPACES
from mlo import EngineError, engine_from
from mlo.errors import nearest

__all__ = [
    "MOST_ROUNDS",
    "Channels",
    "Recipe",
]

UNASKED = {"asks_packages": False}
"""The context of a validation that asks no package for operations and generators."""


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, validate_default=True, allow_inf_nan=False
    )


def _without_point(value: Any) -> Any:
    """3.0 and 1e4 as integers; anything else unchanged."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_without_point)]
"""A whole number: 3, 3.0 or 1e4, but no truth value and no text that looks like a number."""

Count = Annotated[Whole, Field(lt=2**53)]
"""A count. Its products with fractions are floats, which are exact below 2**53."""


MOST_ROUNDS = 10**9
"""Maximum number of rounds of a phase; the smallest network takes months for them."""

Rounds = Annotated[Whole, Field(le=MOST_ROUNDS)]
"""A number of rounds, or of epochs of at least one round."""


def _no_truth_value(value: Any) -> Any:
    """The value, unless it is true or false, which Python treats as 1 and 0."""
    if isinstance(value, bool):
        raise ValueError(f"1 or 3, got {str(value).lower()}")  # noqa: TRY004 - pydantic's rule
    return value


Channels = Annotated[Literal[1, 3], BeforeValidator(_no_truth_value)]
"""Number of image channels: 1 (grey) or 3 (RGB)."""

Beta = Annotated[float, Field(ge=0, lt=1)]
Betas = Annotated[tuple[Beta, Beta], Field(strict=False)]
"""strict=False: YAML has no tuples, so a list is accepted; its items stay strict."""

MOST_CELLS, MOST_NODES = 1000, 64
"""A cell of n nodes has n(n + 3)/2 edges of 8 operations: 64 nodes are 17,152 of them."""

AddedLayers = Annotated[Whole, Field(ge=-MOST_CELLS, le=MOST_CELLS)]
DroppedOperations = Annotated[Count, Field(ge=1)]
DropoutRate = Annotated[float, Field(ge=0, lt=1)]
Change = Annotated[float, Field(ge=0)]
HueChange = Annotated[float, Field(ge=0, le=0.5)]
"""As a part of the circle: half of it reaches every hue."""


class Augmentation(Section):
    """Random changes of training images."""

    crop_padding: Count = Field(
        default=0, ge=0, description="pixels of zero padding before a random crop"
    )
    flip: bool = Field(default=False, description="mirror left-right with probability 1/2")
    cutout: Count = Field(default=0, ge=0, description="side of a square that is set to the mean")
    resized_crop: bool = Field(
        default=False, description="a window of 8% to 100% of the image, scaled to its size"
    )
    color_jitter: tuple[Change, Change, Change, HueChange] = Field(
        default=(0.0, 0.0, 0.0, 0.0),
        strict=False,
        description="largest change of brightness, contrast and saturation (around 1) and hue (at "
        "most 0.5, half the circle)",
    )


DETERMINISTIC: Any = Field(
    default=False,
    description="on a GPU, algorithms that repeat bit for bit, some of them slower; an operation "
    "without one ends the run",
)

FITS_BATCH: Any = Field(
    default=False,
    description="if there are fewer images than a batch, the batch shrinks to their number; "
    "false if batch_size is given besides a preset",
)


def _as_text(value: Any) -> Any:
    """A whole number as text; anything else unchanged."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


ClassName = Annotated[str, BeforeValidator(_as_text)]
"""The name of a class, or its number if the names are no numbers."""

Share = Annotated[float, Field(gt=0, le=1)]


class WrongLabels(Section):
    """A share of a class's training images that is labelled as other classes."""

    of: ClassName = Field(description="the class")
    as_: Annotated[tuple[ClassName, ...], Field(strict=False)] = Field(
        alias="as", min_length=1, description="classes that its images are labelled as, at random"
    )
    share: Share = Field(default=0.5, description="of its images")
    in_: Literal["train", "both"] = Field(
        default="train",
        alias="in",
        description="train: D_tr and the training, while D_val has the correct labels; both: "
        "D_val too",
    )

    model_config = ConfigDict(validate_by_name=True)


class Data(Section):
    """Which data are read, how much of them, and under which conditions."""

    image_size: Count | None = Field(
        default=None, ge=8, description="images larger than this are reduced to it"
    )
    search_images: Count | None = Field(
        default=None, ge=2, description="training images that the search uses, both halves"
    )
    search_fractions: tuple[float, float] = Field(
        default=(0.5, 0.5),
        strict=False,
        description="of these images, the parts that weights and architecture learn on",
    )
    train_images: Count | None = Field(
        default=None, ge=2, description="training images of the derived network"
    )
    test_images: Count | None = Field(default=None, ge=1, description="test images")
    wrong_labels: tuple[WrongLabels, ...] = Field(
        default=(),
        strict=False,
        description="labels made wrong, for experiments: [{of: cat, as: [dog], share: 0.5, in: "
        "train}]",
    )
    class_shares: dict[ClassName, Share] = Field(
        default_factory=dict,
        description="classes reduced, for experiments: class → share of its images that is kept "
        "for D_tr, D_val and the training",
    )
    imbalance: Share | None = Field(
        default=None,
        description="share of the last class that is kept, with an exponential decay from the "
        "first; class_shares overrides it",
    )
    conditions_apply_to: Literal["all", "search"] = Field(
        default="all",
        description="wrong_labels, class_shares and imbalance: in the search and the training of "
        "the derived network, or in the search alone; never in the test",
    )
    in_memory: bool | None = Field(
        default=None,
        description="folder: whether all images are decoded at the start; null: if they take at "
        "most a quarter of the memory",
    )
    groups: str | None = Field(
        default=None,
        description="folder: a CSV file with the columns file and group; images of one group (a "
        "patient) stay together in D_tr, D_val or the test images",
    )
    fit: Literal["crop", "pad", "stretch"] = Field(
        default="crop",
        description="folder: how an image becomes square: its centre is cut out, it is padded with "
        "black, or stretched",
    )
    channels: Channels | None = Field(
        default=None,
        description="folder: 1 for grey, 3 for colours; null: 1 if all training images are grey",
    )
    bits: Count | None = Field(
        default=None,
        ge=1,
        le=32,
        description="folder, more than 8 bits: values from 0 to 2 ** bits - 1 become 0 to 255; "
        "null: those from the lowest to the highest value of the training images",
    )
    background: Literal["white", "black"] = Field(
        default="white", description="folder: the colour behind transparent pixels"
    )
    on_damaged: Literal["stop", "skip"] = Field(
        default="stop",
        description="folder: skip leaves out files that cannot be read; every file is read at the "
        "start to find them",
    )

    @property
    def has_conditions(self) -> bool:
        """Whether labels are made wrong or classes reduced."""
        return bool(self.wrong_labels or self.class_shares) or self.imbalance is not None

    @field_validator("wrong_labels")
    @classmethod
    def _one_entry_a_class(cls, value: tuple[WrongLabels, ...]) -> tuple[WrongLabels, ...]:
        names = [wrong.of for wrong in value]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"wrong_labels needs one entry per class; {twice[0]} has several")
        return value

    @field_validator("class_shares", mode="before")
    @classmethod
    def _one_share_a_class(cls, value: Any) -> Any:
        # 3 and "3" are two keys of YAML, and one class.
        names = [str(name) for name in value] if isinstance(value, Mapping) else []
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise ValueError(f"class_shares needs one share per class; {twice[0]} has several")
        return value

    @field_validator("search_fractions")
    @classmethod
    def _parts(cls, value: tuple[float, float]) -> tuple[float, float]:
        if min(value) <= 0 or sum(value) > 1 + 1e-9:
            raise ValueError(
                f"search_fractions must be positive and sum to at most 1, got {list(value)}"
            )
        return value

    @field_validator("image_size")
    @classmethod
    def _divisible(cls, value: int | None) -> int | None:
        if value is not None and value % 4:
            raise ValueError("image_size must be divisible by 4: two cells halve the resolution")
        return value


class WeightOptimizer(Section):
    """SGD with momentum, and a schedule that steps with the epochs."""

    schedule: Literal["cosine", "linear"] = Field(default="cosine", description="from lr to min_lr")
    warmup_epochs: Count = Field(
        default=0, ge=0, description="first epochs in which the rate grows linearly to lr"
    )
    lr: float = Field(default=0.025, gt=0)
    min_lr: float = Field(default=0.001, ge=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=3e-4, ge=0)
    grad_clip: float | None = Field(default=5.0, gt=0)

    @model_validator(mode="after")
    def _ordered(self) -> WeightOptimizer:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr ({self.min_lr}) must not be above lr ({self.lr})")
        return self


class ArchitectureOptimizer(Section):
    """Adam for the architecture."""

    lr: float = Field(default=3e-4, gt=0)
    weight_decay: float = Field(default=1e-3, ge=0)
    betas: Betas = (0.5, 0.999)
    grad_clip: float | None = Field(default=None, gt=0)
    warmup_epochs: Count = Field(
        default=0, ge=0, description="first epochs in which only the weights move"
    )
    moves_first: bool = Field(
        default=False,
        description="the architecture moves first in a round, at weights one step ahead (DARTS's "
        "program); by default it moves last (Algorithm 1)",
    )


class StartingWeights(Section):
    """Weights of another run to start from, instead of random ones."""

    run: str | None = Field(default=None, description="run folder to take them from")
    digest: str | None = Field(
        default=None, description="of the weights; filled in, or checked if it is given"
    )

    @model_validator(mode="after")
    def _of_a_run(self) -> StartingWeights:
        if self.run is None and self.digest is not None:
            raise ValueError("digest needs run, the folder with the weights")
        return self


class Generator(Section):
    """The conditional image generator, and Adam for it and its discriminator."""

    name: str = Field(
        default="dcgan",
        description="a name in generators/games.py, or real: draws training images that the "
        "search does not use, to leave a GAN's quality out of a comparison",
    )
    noise_dim: Count = Field(default=64, ge=1)
    channels: Count = Field(default=32, ge=1)
    lr: float = Field(default=2e-4, gt=0, description="of the generator")
    discriminator_lr: float = Field(default=2e-4, gt=0)
    discriminator_steps: Count = Field(
        default=1,
        ge=1,
        le=1000,
        description="moves of the discriminator per move of the generator, each on its own batch",
    )
    betas: Betas = (0.5, 0.999)
    discriminator_norm: Literal["group", "batch", "instance", "none"] | None = Field(
        default=None,
        description="norm of the discriminator's cells; null: the generator's usual one",
    )
    discriminator_head: Literal["flatten", "sum"] | None = Field(
        default=None,
        description="flatten keeps the positions of features, sum adds them up; null: the "
        "generator's usual one",
    )
    quality: Literal["snapshots", "end", "never"] = Field(
        default="end",
        description="when GAN-test, GAN-train and variety are measured (generator_quality.py): in "
        "the rounds of the snapshots, at the end of the search, or never",
    )
    warmup_rounds: Rounds = Field(
        default=0,
        ge=0,
        description="rounds of the game alone, before the search, with a small discriminator "
        "without an architecture",
    )
    warmup_batch_size: Count | None = Field(
        default=None, ge=2, description="null: that of the search"
    )
    warmup_lr: float = Field(default=5e-4, gt=0)
    warmup_discriminator_lr: float = Field(default=5e-4, gt=0)
    warmup_betas: Betas = (0.5, 0.999)
    warmup_discriminator_channels: Count = Field(
        default=32, ge=1, description="of its first convolution"
    )
    warmup_augmentation: bool = Field(
        default=True,
        description="the discriminator sees real and generated images under random augmentation",
    )
    init: StartingWeights = Field(
        default=StartingWeights(), description="of the generator: from the warm-up of a run"
    )
    warmed_lr: float = Field(
        default=1e-4,
        gt=0,
        description="replaces lr in the search for a generator that has learned before, by a "
        "warm-up or init; at a higher rate a new discriminator would ruin it",
    )

    @property
    def begins_warm(self) -> bool:
        """Whether the generator has learned before the search."""
        return self.warmup_rounds > 0 or self.init.run is not None

    @field_validator("name")
    @classmethod
    def _known(cls, value: str, info: ValidationInfo) -> str:
        if info.context == UNASKED:
            return value
        if value != REAL:
            GAMES.named(value)
        elif REAL in GAMES:
            raise ValueError(
                f"a package brings a generator called {REAL}, which is the name for drawing real "
                "images. Rename it, or remove the package"
            )
        return value


class Lookup(Section):
    """A table of all cells of the space, to take the test error from instead of training."""

    file: str | None = Field(
        default=None,
        description="a CSV file of ours, or NATS-Bench's file or folder (docs/nasbench201.md)",
    )
    digest: str | None = Field(
        default=None, description="of the file; filled in, or checked if it is given"
    )
    dataset: str | None = Field(
        default=None,
        description="name of the data set in the table; null: the name of the run's data set",
    )

    @model_validator(mode="after")
    def _of_a_file(self) -> Lookup:
        if self.file is None and (self.digest, self.dataset) != (None, None):
            raise ValueError("digest and dataset need file, the table that they belong to")
        return self


class Budget(Section):
    """What the derived network may cost at most, in millions; null: no limit."""

    parameters: float | None = Field(
        default=None, gt=0, description="millions of trainable parameters"
    )
    multiply_adds: float | None = Field(
        default=None, gt=0, description="millions of multiply-adds for one image"
    )
    weight: float = Field(
        default=1.0, gt=0, description="weight of the penalty in the architecture's loss"
    )


class Progressive(Section):
    """The stages of P-DARTS: deeper supernets with fewer operations per edge."""

    added_layers: tuple[AddedLayers, ...] = Field(
        default=(0, 6, 12),
        strict=False,
        description="cells that each stage has in addition to `layers`; fewer where negative",
    )
    dropped_operations: tuple[DroppedOperations, ...] = Field(
        default=(3, 2, 2),
        strict=False,
        description="operations that each edge loses after each stage",
    )
    skip_dropout: tuple[DropoutRate, ...] = Field(
        default=(0.1, 0.4, 0.7), strict=False, description="initial dropout on identities"
    )
    max_skips: Count = Field(
        default=2, ge=0, description="skip connections in the derived normal cell, at most"
    )

    @model_validator(mode="after")
    def _one_entry_a_stage(self) -> Progressive:
        lengths = {len(self.added_layers), len(self.dropped_operations), len(self.skip_dropout)}
        if len(lengths) > 1 or lengths == {0}:
            raise ValueError(
                "added_layers, dropped_operations and skip_dropout need one entry for each stage"
            )
        return self


def _names_in(value: Any) -> tuple[str, ...]:
    """Turns a list of names into a tuple."""
    if not isinstance(value, (list, tuple)) or not all(isinstance(name, str) for name in value):
        raise ValueError(
            f"a list of names is needed, such as [none,skip_connect], got {shown(value)}"
        )
    return tuple(value)


class Search(Section):
    """The architecture search."""

    method: Literal["lfmcw", "darts", "random"] = Field(
        default="lfmcw",
        description="darts: the baseline, without W1 and the generator; random: cells drawn by the "
        "seed, no search",
    )
    space: str = Field(default="darts", description="a name in spaces.py")
    primitives: Any = Field(
        default=DARTS_PRIMITIVES,
        description="candidate operations, names in search_space/operations.py: a list for every "
        "edge, or {normal: […], reduction: […]} with a list for each",
    )
    partial_channels: Count = Field(
        default=4, ge=1, description="pcdarts: operations see 1 in so many channels"
    )
    progressive: Progressive = Field(
        default=Progressive(), description="pdarts: its stages, each of epochs or steps"
    )
    stem: Literal["cifar", "imagenet"] = Field(
        default="cifar", description="imagenet: to an eighth of the resolution"
    )
    channels: Count = Field(
        default=16,
        ge=4,
        description="channels of a node in the first cell (with 2, oneDNN of torch 2.14.1 corrupts "
        "memory)",
    )
    layers: Count = Field(default=8, ge=3, le=MOST_CELLS, description="cells of the supernet")
    nodes: Count = Field(default=4, ge=1, le=MOST_NODES, description="intermediate nodes of a cell")
    epochs: float | None = Field(
        default=None, gt=0, le=MOST_ROUNDS, description="passes over the search's training half"
    )
    steps: Rounds | None = Field(default=None, ge=1, description="rounds; given instead of epochs")
    batch_size: Count = Field(default=64, ge=2)
    fits_batch: bool = FITS_BATCH
    order: Literal["first", "second"] = Field(
        default="second", description="first: drop all implicit terms"
    )
    hypergradient: Any = Field(
        default="one_step",
        description="second order: engine, or problem → engine (w1, gan, w2, default)",
    )
    lam: float = Field(
        default=1.0, ge=0, alias="lambda", description="λ: weight of the generated images"
    )
    class_weighting: Literal["losses", "uniform"] = Field(
        default="losses",
        description="uniform: every class gets the mean of the class losses, the control of the "
        "method",
    )
    absent_class: Literal["running_mean", "batch_mean", "zero"] = Field(
        default="running_mean",
        description="class weight of a class without validation images in the batch",
    )
    validation_batch: Literal["same", "independent", "matched"] = Field(
        default="same",
        description="batch for the class weights: A's batch, another one from D_val, or one with "
        "the classes of the training batch",
    )
    synthetic_only: bool = Field(
        default=False, description="W2 learns from generated images only (Eq. 19)"
    )
    gradient_terms_every: Count = Field(
        default=0,
        ge=0,
        description="rounds between records of the terms of A's gradient (through W2, W1, G); 0: "
        "never",
    )
    precision: Literal["bf16"] | None = Field(
        default=None, description="bf16: all losses under bfloat16 autocast; first order only"
    )
    tf32: bool = Field(
        default=False,
        description="on a GPU, float32 convolutions and products in TF32 (ten bits of the "
        "mantissa); finite differences never are",
    )
    deterministic: bool = DETERMINISTIC
    checkpointing: bool = Field(
        default=False,
        description="cells are recomputed in backward passes instead of keeping activations: "
        "less memory",
    )
    compile: Literal["inductor", "aot_eager", "eager"] | None = Field(
        default=None,
        description="backend of torch.compile for supernets and discriminator: fewer launches on a "
        "GPU, after minutes of compiling; first order or finite differences only",
    )
    weights: WeightOptimizer = WeightOptimizer()
    architecture: ArchitectureOptimizer = ArchitectureOptimizer()
    generator: Generator = Generator()
    budget: Budget = Budget()
    init: StartingWeights = Field(
        default=StartingWeights(), description="of the supernets: from the search of a run"
    )
    augmentation: Augmentation = Augmentation()

    model_config = ConfigDict(validate_by_name=True)

    @property
    def draws_real(self) -> bool:
        """Whether the generated images are real ones, so that there is no game."""
        return self.method == "lfmcw" and self.generator.name == REAL

    @field_validator("hypergradient")
    @classmethod
    def _known_engines(cls, value: Any) -> Any:
        per_problem = isinstance(value, Mapping) and "name" not in value
        # One engine, by name or with options, or one per lower problem.
        for problem, choice in value.items() if per_problem else [("default", value)]:
            if problem not in ("default", "w1", "gan", "w2"):
                raise ValueError(
                    f"no lower problem {problem!r}. "
                    f"{nearest(str(problem), ['default', 'w1', 'gan', 'w2'])}"
                )
            try:
                engine_from(choice)
            except EngineError as error:
                raise ValueError(str(error)) from None
        return value

    @model_validator(mode="after")
    def _one_length(self) -> Search:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give either epochs or steps (set the other to null)")
        return self

    @field_validator("primitives")
    @classmethod
    def _names(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return _names_in(value)
        if set(value) != {"normal", "reduction"}:
            raise ValueError(
                "primitives has the keys normal and reduction, each a list with the names of each "
                f"edge, or is one list of names; got {shown(value)}"
            )
        if not all(isinstance(edges, (list, tuple)) for edges in value.values()):
            raise ValueError(
                f"primitives.normal and .reduction are lists of lists, got {shown(value)}"
            )
        return {kind: tuple(map(_names_in, value[kind])) for kind in ("normal", "reduction")}

    @model_validator(mode="after")
    def _fits_its_space(self, info: ValidationInfo) -> Search:
        if info.context != UNASKED:
            SPACES.named(self.space).check(self)
        return self

    @model_validator(mode="after")
    def _is_precise_enough(self) -> Search:
        if self.precision == "bf16" and self.order == "second":
            raise ValueError(
                "precision bf16 rounds second derivatives away (docs/benchmarks.md): set order to "
                "first, or precision to null"
            )
        return self

    @model_validator(mode="after")
    def _can_be_compiled(self) -> Search:
        if self.compile is None or self.method == "random":
            return self
        if self.checkpointing:
            raise ValueError(
                f"compile {self.compile} and checkpointing: recomputed cells are not compiled "
                "(torch 2.14.1). Set checkpointing to false, or compile to null"
            )
        if self.order == "first":
            return self
        # One engine, or one per lower problem, "default" for the others.
        several = isinstance(self.hypergradient, Mapping) and "name" not in self.hypergradient
        choices = dict(self.hypergradient) if several else {"default": self.hypergradient}
        for choice in {"default": "one_step", **choices}.values():
            engine = engine_from(choice)
            if engine.uses_second_derivatives:
                raise ValueError(
                    f"compile {self.compile} and the engine {engine.label!r}: compiled modules "
                    "have no second derivatives. Set order to first, hypergradient to darts "
                    "(finite differences) for every problem, or compile to null"
                )
        return self

    @model_validator(mode="after")
    def _generates(self) -> Search:
        if self.synthetic_only and self.method != "lfmcw":
            raise ValueError(
                f"synthetic_only needs generated images, but method {self.method} has none"
            )
        if self.draws_real and self.generator.init.run is not None:
            raise ValueError(
                "generator.init gives weights of a generator, but with generator.name real there "
                "is none: drop one of them"
            )
        if self.synthetic_only and self.lam == 0.0:
            raise ValueError("synthetic_only with lambda 0 leaves W2 nothing to learn from")
        return self


class Evaluation(Section):
    """Training of the derived network from scratch."""

    channels: Count = Field(default=36, ge=2)
    layers: Count = Field(default=20, ge=3, le=MOST_CELLS)
    epochs: Rounds | None = Field(default=600, ge=1)
    steps: Rounds | None = Field(default=None, ge=1, description="rounds; given instead of epochs")
    min_steps: Rounds = Field(
        default=0,
        ge=0,
        description="least number of rounds: epochs are added until it is reached; 0 if epochs "
        "are given besides a preset",
    )
    batch_size: Count = Field(default=96, ge=2)
    fits_batch: bool = FITS_BATCH
    weights: WeightOptimizer = WeightOptimizer(min_lr=0.0)
    stem: Literal["cifar", "imagenet"] = Field(
        default="cifar", description="imagenet: to an eighth of the resolution"
    )
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    precision: Literal["bf16"] | None = Field(
        default=None, description="bf16: losses under bfloat16 autocast"
    )
    tf32: bool = Field(
        default=True, description="on a GPU, float32 convolutions and products in TF32"
    )
    deterministic: bool = DETERMINISTIC
    auxiliary_weight: float = Field(
        default=0.4, ge=0, description="weight of the auxiliary head's loss; 0: no head"
    )
    drop_path: float = Field(
        default=0.3, ge=0, lt=1, description="drop-path probability of the last epoch"
    )
    init: StartingWeights = Field(
        default=StartingWeights(), description="of the network: from the trained one of a run"
    )
    augmentation: Augmentation = Augmentation()

    @model_validator(mode="after")
    def _one_length(self) -> Evaluation:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give either epochs or steps (set the other to null)")
        return self


class Distributed(Section):
    """How the processes of torchrun share the work; without effect in a single one."""

    sync: Literal["exact", "final"] = Field(
        default="exact",
        description="exact: the gradients of the whole batch; final: one reduction per update, "
        "with a bias",
    )
    sync_batchnorm: bool = Field(
        default=False,
        description="BatchNorm with the statistics of the whole batch, not of each process's share",
    )


class Recipe(Section):
    """Everything that decides what a run computes."""

    preset: str = "custom"
    dataset: str = "digits"
    seed: Whole = Field(default=0, ge=0, lt=2**62)
    trial: bool = Field(
        default=False, description="cut short by --max-steps, so the result is meaningless"
    )
    checkpoint_every: Count = Field(
        default=50, ge=1, description="rounds of the search between checkpoints"
    )
    checkpoint_keep_every: Count = Field(
        default=0,
        ge=0,
        description="every checkpoint with this interval is kept; 0: only the last two and the "
        "best",
    )
    on_nonfinite: Literal["stop", "skip", "rollback"] = Field(
        default="stop",
        description="if a loss or gradient is not finite, the run stops, or the update is "
        "skipped, or the run goes back to its last checkpoint with other batches and noise; each "
        "is bounded",
    )
    detect_collapse: bool = Field(
        default=False,
        description="warn of skip-connection collapse, and of a GAN that does not learn or draw "
        "(collapse.py)",
    )
    data: Data = Data()
    # Imported when it is needed: so a package's entry that cannot be used is an error of the
    # recipe, and it may itself import this module.
    search: Search = Field(default_factory=lambda: Search(epochs=50))
    evaluation: Evaluation = Evaluation()
    lookup: Lookup = Lookup()
    distributed: Distributed = Distributed()

    @model_validator(mode="after")
    def _trains_what_is_started(self) -> Recipe:
        if not self.trains and self.evaluation.init.run is not None:
            raise ValueError(
                "evaluation.init gives starting weights for a training, but with lookup nothing "
                "is trained; drop one of them"
            )
        if not self.trains and self.data.has_conditions and self.data.conditions_apply_to == "all":
            raise ValueError(
                "conditions of the data would apply to the training of the derived network, but "
                "its error is looked up; set data.conditions_apply_to to search"
            )
        return self

    @property
    def trains(self) -> bool:
        """Whether the derived network is trained; if not, its error is looked up."""
        return self.lookup.file is None

    def to_yaml(self) -> str:
        """Returns the recipe as YAML that `load_recipe` reads back."""
        return dump_yaml(self.model_dump(mode="json", by_alias=True))
