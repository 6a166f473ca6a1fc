"""Finalists over paired seeds: means, intervals, and how much of the search's best was luck. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from caltech_hpo.results.scores import mean_accuracy, mean_interval
from caltech_hpo.search.records import TrialRecord
from caltech_hpo.spec import Frozen


class Candidate(Frozen):
    """A trial that is to be confirmed. `value` is what the search saw of it: validation top-1, 0 to 1."""

    trial: int
    configuration: str
    params: dict[str, Any]
    value: float


class Finalist(Frozen):
    """A configuration over the confirmation's seeds. Accuracies are validation top-1, 0 to 1.

    `values` are in the order of the confirmation's seeds; `sd` and `ci95` (Student's t, of the mean)
    are None for one seed. `behind` is the mean over seeds of the first ranked one's value minus this
    one's, with its paired t interval `behind_ci95` (None for the first, and for one seed).
    `optimism` is `search_value` minus `mean`. `diverged` counts trainings that diverged.
    """

    trial: int
    configuration: str
    params: dict[str, Any]
    search_value: float
    values: tuple[float, ...]
    mean: float
    sd: float | None
    ci95: tuple[float, float] | None
    behind: float
    behind_ci95: tuple[float, float] | None
    optimism: float
    diverged: int


class Confirmation(Frozen):
    """Finalists, best mean first. `seeds` are those that all of them have; `asked_seeds` were asked for.

    `search_best` is the trial of highest search value, `optimism` that value minus the same trial's
    confirmed mean: what choosing the best of many noisy trials added to its score.
    """

    study: str
    seeds: tuple[int, ...]
    asked_seeds: int
    finalists: tuple[Finalist, ...]
    search_best: int
    optimism: float

    @property
    def winner(self) -> Finalist:
        """The finalist of highest mean."""
        return self.finalists[0]


def candidates(records: Sequence[TrialRecord], count: int) -> list[Candidate]:
    """The best `count` complete trials with distinct configurations, best first; the earliest of equals.

    Fewer where there are fewer.
    """
    found: dict[str, Candidate] = {}
    complete = [record for record in records if record.state == "complete" and record.value is not None]
    for record in sorted(complete, key=lambda record: (-(record.value or 0.0), record.number)):
        if record.recipe is not None and record.recipe.fit_on == "train":
            configuration = record.recipe.configuration
            candidate = Candidate(
                trial=record.number, configuration=configuration, params=record.params,
                value=record.value or 0.0,
            )  # fmt: skip
            found.setdefault(configuration, candidate)
    return list(found.values())[:count]


def rank(
    study: str, asked: Sequence[Candidate], seeds: Sequence[int],
    values: Mapping[tuple[str, int], float], diverged: Mapping[str, int],
) -> Confirmation | None:  # fmt: skip
    """Ranks the candidates over the asked seeds that all of them have, so that every mean is paired.

    `values` is by configuration and seed, `diverged` counts by configuration. None while no seed is
    whole. Equal means are ranked by search value, then by trial.
    """
    paired = tuple(seed for seed in seeds if all((one.configuration, seed) in values for one in asked))
    if not paired or not asked:
        return None
    runs = {one.trial: tuple(values[one.configuration, seed] for seed in paired) for one in asked}
    means = {trial: mean_accuracy(run) for trial, run in runs.items()}
    ordered = sorted(asked, key=lambda one: (-means[one.trial].mean, -one.value, one.trial))
    first = runs[ordered[0].trial]
    finalists = []
    for one in ordered:
        own, run = means[one.trial], runs[one.trial]
        behind = mean_interval([a - b for a, b in zip(first, run, strict=True)])
        finalists.append(
            Finalist(
                trial=one.trial, configuration=one.configuration, params=one.params,
                search_value=one.value, values=run, mean=own.mean, sd=own.sd, ci95=own.ci95,
                behind=behind.mean, behind_ci95=behind.ci95 if one is not ordered[0] else None,
                optimism=one.value - own.mean, diverged=diverged.get(one.configuration, 0),
            )
        )  # fmt: skip
    best = min(finalists, key=lambda finalist: (-finalist.search_value, finalist.trial))
    return Confirmation(
        study=study, seeds=paired, asked_seeds=len(seeds), finalists=tuple(finalists),
        search_best=best.trial, optimism=best.optimism,
    )  # fmt: skip
