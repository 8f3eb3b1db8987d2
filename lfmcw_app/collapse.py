"""Warnings that a search no longer searches: skip-connection collapse, an idle generator.

The rules, each over the last `WINDOW` rounds, with the thresholds below:

    skip collapse      more than half of the derived normal cell's edges are skip connections, and
                       there are more than at the beginning of the window. Chu et al. (DARTS-, 2021)
                       and Liang et al. (DARTS+, 2019) describe it: the weights of identities grow
                       once the other operations' weights overfit.
    discriminator won  its loss was below a hundredth of what a coin would have, in all rounds: the
                       generator's gradient fades (of the hinge it is exactly zero on the
                       discriminator's side).
    discriminator lost its mean scores of real and of generated images differed by less than a
                       hundredth, in all rounds: it tells them apart no better than a coin.
    generator at rest  its gradient's norm was below a millionth of its largest since the beginning,
                       in all rounds.

Three more rules are about what was measured of a generator's pictures (generator_quality.py), where
it was measured:

    pictures alike     two pictures of a class differ by less than a tenth of what real ones do.
    classes not shown  a classifier that was trained on real pictures, and knows others of them,
                       does not recognise the generated ones.
    class marks        that, where W2 knows them: they carry a mark of their class instead.

A warning is given once, and again only after a pause in which the rule was not met. It changes
nothing in the run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lfmcw_app.generator_quality import Quality
from lfmcw_app.generators import GAMES, REAL
from lfmcw_app.recipe import Recipe
from lfmcw_app.search_space.genotype import Cells
from mlo import Record

__all__ = [
    "WINDOW", "CollapseDetector", "Observation", "advised", "doubts_about_pictures", "last_quality",
    "observe", "what_is_known",
]  # fmt: skip

WINDOW = 50
"""Rounds that a rule looks back."""

SKIP_SHARE = 0.5
"""Share of skip connections among the edges of the derived normal cell."""

WON = 0.01
"""Share of the coin's loss below which the discriminator has won."""

LOST = 0.01
"""Difference of mean scores, which are of order 1, below which the discriminator has lost."""

AT_REST = 1e-6
"""Share of its largest gradient below which the generator is at rest."""

ALIKE = 0.1
"""Variety within a class, relative to that of real pictures, below which pictures are alike."""

MARKED, SHOWN, ABLE = 0.5, 0.25, 0.1
"""Pictures are marked if W2 covers at least this share of the way from chance to 100%, and the
classifier of real pictures less than `SHOWN` of its own way on real ones. Its own way must be
`ABLE` of the way to 100%, because otherwise it can tell nothing. The classifier's accuracies are
means over the classes, of which chance is one over their number. W2's is that over its batches, of
which chance is the share of the largest class.
"""

ENOUGH = 2000
"""Rounds of warm-up to try first, as in preset small."""


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What the rules need of one round.

    Attributes:
        skip_share: share of skip connections in the derived normal cell.
        discriminator_loss: None without a generator.
        score_gap: mean score of real images minus that of generated ones.
        generator_norm: Euclidean norm of the generator's gradient.
        generated_accuracy: W2's share of right answers on generated pictures.
    """

    skip_share: float
    discriminator_loss: float | None = None
    score_gap: float | None = None
    generator_norm: float | None = None
    generated_accuracy: float | None = None


def observe(record: Record, genotype: Cells) -> Observation:
    """Takes a round's observation from its record and the genotype that would be derived now."""
    share = genotype.skip_share
    if "gan" not in record.losses:
        return Observation(skip_share=share)
    metrics = record.metrics["gan"]
    return Observation(
        skip_share=share,
        discriminator_loss=record.losses["gan"]["discriminator"],
        score_gap=metrics["real_score"] - metrics["fake_score"],
        generator_norm=record.player_gradient_norms["gan"]["generator"],
        generated_accuracy=record.metrics.get("w2", {}).get("generated_accuracy"),
    )


def doubts_about_pictures(quality: Quality, generated_accuracy: float | None) -> dict[str, str]:
    """Rule → what is wrong, for the rules that a generator's pictures meet; see `advised`.

    Args:
        quality: as it was measured.
        generated_accuracy: W2's share of right answers on generated pictures, over some rounds;
            None where there is no W2.
    """
    met = {}
    if quality.variety is not None and quality.variety < ALIKE:
        met["alike"] = (
            "The generator has collapsed: its pictures of a class are all alike (their variety is "
            f"{quality.variety:.2f}, and that of real pictures is 1)."
        )
    chance, real = quality.chance, quality.real - quality.chance
    if not _is_able(quality) or quality.gan_test - chance >= SHOWN * real:
        return met
    known = (
        f"a classifier trained on real pictures recognises only {_share(quality.gan_test)} of them "
        f"and {_share(quality.real)} of other real ones ({_read_beside(quality)})."
    )
    accuracy = 0.0 if generated_accuracy is None else 100.0 * generated_accuracy
    constant = chance if quality.largest is None else quality.largest
    if accuracy - constant > MARKED * (100.0 - constant):
        met["marks"] = (
            "The generated pictures carry a mark of their class instead of showing it. W2 "
            f"recognises {accuracy:.0f}% of them, but {known}"
        )
    else:
        met["unlike"] = f"The generated pictures do not show their classes: {known}"
    return met


def advised(doubts: Sequence[str], recipe: Recipe) -> list[str]:
    """The doubts of `doubts_about_pictures`, the last one with advice on what to do.

    Args:
        doubts: what is wrong with a generator's pictures.
        recipe: of the run.
    """
    return [*doubts[:-1], f"{doubts[-1]} {_advice(recipe)}"] if doubts else []


def _advice(recipe: Recipe) -> str:
    how = recipe.search.generator
    if recipe.preset == "smoke" and not how.begins_warm:
        return (
            "Preset smoke is too short to train a generator, so this is to be expected. For "
            "pictures that show their classes, leave out --preset."
        )
    others = ", ".join(name for name in GAMES if name != how.name)
    rounds = max(ENOUGH, 2 * how.warmup_rounds)
    return (
        "Such pictures teach W2 nothing about the classes. Train the generator longer before the "
        f"search (search.generator.warmup_rounds={rounds}; this run has {how.warmup_rounds}), or "
        f"choose another search.generator.name ({others})."
    )


def what_is_known(quality: Quality, doubts: Sequence[str]) -> str:
    """What was measured of a generator's pictures, in a sentence or two without advice.

    Args:
        quality: as it was measured.
        doubts: those of `doubts_about_pictures`.
    """
    if doubts:
        return " ".join(doubts)
    if not _is_able(quality):
        return (
            "Whether the generated pictures show their classes is not known: a classifier trained "
            f"on real pictures recognises only {_share(quality.real)} even of other real ones "
            f"({_read_beside(quality)})."
        )
    return (
        f"A classifier trained on real pictures recognises {_share(quality.gan_test)} of the "
        f"generated ones and {_share(quality.real)} of other real ones ({_read_beside(quality)})."
    )


def _read_beside(quality: Quality) -> str:
    """What accuracies are read beside."""
    return f"means over the classes; chance is {_share(quality.chance)}"


def _is_able(quality: Quality) -> bool:
    """Whether the classifier of real pictures knows enough to judge others."""
    return quality.real - quality.chance > ABLE * (100.0 - quality.chance)


def _share(percent: float) -> str:
    """A percentage in whole numbers."""
    return f"{percent:.0f}%"


def _mean(shares: Sequence[float]) -> float | None:
    return sum(shares) / len(shares) if shares else None


def last_quality(
    entries: Sequence[Mapping[str, Any]], rounds: int | None = None
) -> tuple[int, Quality, list[str]] | None:
    """What was last measured of a generator, from the lines of a phase in metrics.jsonl.

    Args:
        entries: the lines.
        rounds: those of later rounds are left out.

    Returns:
        The round, the measures, and doubts about the pictures; None where nothing was measured.
    """
    seen = [entry for entry in entries if rounds is None or entry["round"] <= rounds]
    places = [place for place, entry in enumerate(seen) if "quality" in entry]
    if not places:
        return None
    last = places[-1]
    metrics = (
        entry["metrics"].get("w2", {}) for entry in seen[max(0, last + 1 - WINDOW) : last + 1]
    )
    known = [found["generated_accuracy"] for found in metrics if "generated_accuracy" in found]
    quality = Quality.from_data(seen[last]["quality"])
    met = doubts_about_pictures(quality, _mean(known))
    return seen[last]["round"], quality, list(met.values())


@dataclass(kw_only=True)
class CollapseDetector:
    """Follows a search and says when it collapses.

    Attributes:
        game: name of the generator's game, which decides what a discriminator's loss means; `REAL`
            where there is none.
        window: rounds that a rule looks back.
        recipe: of the run, by which doubts about pictures give advice; without one they give none.
    """

    game: str = "dcgan"
    window: int = WINDOW
    recipe: Recipe | None = None
    _seen: deque[Observation] = field(default_factory=deque, repr=False)
    _largest_norm: float = field(default=0.0, repr=False)
    _told: set[str] = field(default_factory=set, repr=False)
    _told_of_pictures: set[str] = field(default_factory=set, repr=False)

    def update(self, observation: Observation) -> list[str]:
        """Takes the next round; returns the warnings that are new."""
        self._seen.append(observation)
        if len(self._seen) > self.window:
            self._seen.popleft()

        # The largest norm is that of the whole search, not only of the window.
        self._largest_norm = max(self._largest_norm, observation.generator_norm or 0.0)
        if len(self._seen) < self.window:
            return []
        # A rule that is met again after a pause is told again.
        met = self._met()
        new = [text for rule, text in met.items() if rule not in self._told]
        self._told = set(met)
        return new

    def measured(self, quality: Quality) -> list[str]:
        """Takes what was measured after the last observation; returns the warnings that are new."""
        known = [
            observation.generated_accuracy
            for observation in self._seen
            if observation.generated_accuracy is not None
        ]
        met = doubts_about_pictures(quality, _mean(known))
        new = [text for rule, text in met.items() if rule not in self._told_of_pictures]
        self._told_of_pictures = set(met)
        return new if self.recipe is None else advised(new, self.recipe)

    def _met(self) -> Mapping[str, str]:
        """Rule → warning, for the rules that hold over the whole window."""
        first, last, met = self._seen[0], self._seen[-1], {}

        # After the warning, a share that stays high is enough; it need not rise further.
        rises = last.skip_share > first.skip_share or "skip" in self._told
        if last.skip_share > SKIP_SHARE and rises:
            met["skip"] = (
                f"{100 * last.skip_share:.0f}% of the normal cell's edges are skip connections, "
                f"up from {100 * first.skip_share:.0f}% {self.window} rounds ago: skip-connection "
                "collapse. Search for fewer epochs, or with more weight decay."
            )

        coin = None if self.game == REAL else GAMES[self.game].coin_loss
        if coin is not None and self._all("discriminator_loss", lambda loss: loss < WON * coin):
            met["won"] = (
                f"The discriminator's loss was below {WON * coin:.3g} for {self.window} rounds: "
                "it recognises every image, and the generator learns nothing more. Lower "
                "search.generator.discriminator_lr."
            )

        if self._all("score_gap", lambda gap: abs(gap) < LOST):
            met["lost"] = (
                f"The discriminator scored real and generated images alike (within {LOST:g}) for "
                f"{self.window} rounds: it has stopped learning. Raise "
                "search.generator.discriminator_lr, or choose another discriminator_norm."
            )

        if self._all("generator_norm", lambda norm: norm <= AT_REST * self._largest_norm):
            met["rest"] = (
                f"The generator's gradient was below {AT_REST:g} of its largest for {self.window} "
                "rounds: it has stopped learning. Raise search.generator.lr, or lower "
                "search.generator.discriminator_lr."
            )
        return met

    def _all(self, name: str, holds: Any) -> bool:
        values = [getattr(observation, name) for observation in self._seen]
        return all(value is not None and holds(value) for value in values)
