"""What other pruners would have done: the stored curves of a search, fed to them again."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from caltech_hpo.data.cache import Progress
from caltech_hpo.errors import UsageError
from caltech_hpo.search.changes import study_spec
from caltech_hpo.search.pruning import DIVERGED, lags, make_pruner, report
from caltech_hpo.search.records import TrialRecord, best_record, trial_records
from caltech_hpo.search.request import Place
from caltech_hpo.search.storage import stored_study
from caltech_hpo.spec import Frozen, PrunerSpec, StudySpec
from caltech_hpo.study_checks import describe

if TYPE_CHECKING:
    import optuna

PRUNERS = ("median", "percentile", "hyperband")
COMPARISONS = ("epoch", "fraction")


class PrunerReplay(Frozen):
    """What one pruner would have saved, and lost. Accuracies are 0 to 1, times are seconds of training.

    `winner_pruned_at` is the epoch at which the stored best trial would have ended, None if it would not.
    `best_value` is the best accuracy among the trials that would have finished, and `regret` what is
    missing to the stored best; both are None where none would have finished.
    """

    pruner: PrunerSpec
    trials_pruned: int
    epochs_saved: int
    share_saved: float
    seconds_saved: float
    winner_pruned_at: int | None
    best_trial: int | None
    best_value: float | None
    regret: float | None


class Replay(Frozen):
    """The stored search and what each pruner would have made of it.

    `trials` were replayed, complete and pruned ones. `cut_short` of them were ended by a pruner or by
    divergence, so that nobody knows how they would have gone on.
    """

    study: str
    trials: int
    cut_short: int
    epochs: int
    seconds: float
    winner: int | None
    winner_value: float | None
    pruners: tuple[PrunerReplay, ...]


@dataclasses.dataclass(frozen=True)
class _Ended:
    """One trial after a replay; `at` is the epoch at which it was pruned, None if it was not."""

    record: TrialRecord
    at: int | None

    @property
    def finished(self) -> bool:
        return self.at is None and self.record.state == "complete"

    @property
    def seconds_saved(self) -> float:
        late = [result for result in self.record.epochs if self.at is not None and result.epoch > self.at]
        return sum(result.seconds for result in late)

    @property
    def epochs_saved(self) -> int:
        return 0 if self.at is None else len(self.record.epochs) - self.at


def replay(
    name: str, place: Place, *, pruners: Sequence[str] = (), compare_at: str | None = None,
    progress: Progress | None = None,
) -> Replay:  # fmt: skip
    """Replays a stored study. Raises UsageError for an unknown study or pruner.

    `pruners` are texts such as "percentile:percentile=25"; without any, all three are tried with the
    study's settings, at each comparison that `compare_at` leaves open.
    """
    study = stored_study(place.storage, name)
    spec = study_spec(study)
    asked = [parse_pruner(text, spec.pruner, compare_at) for text in pruners]
    return replay_records(
        spec.model_copy(update={"name": name}), trial_records(study),
        asked or default_pruners(spec.pruner, compare_at), progress,
    )  # fmt: skip


def parse_pruner(text: str, declared: PrunerSpec, compare_at: str | None = None) -> PrunerSpec:
    """ "NAME" or "NAME:FIELD=VALUE[,FIELD=VALUE...]", the rest as declared. Raises UsageError."""
    name, mark, options = text.partition(":")
    values: dict[str, Any] = declared.model_dump() | {"name": name.strip()}
    if compare_at is not None:
        values["compare_at"] = compare_at
    pairs = [pair.partition("=") for pair in options.split(",")] if mark else []
    for field, equals, value in pairs:
        if not (field.strip() and equals and value.strip()) or field.strip() == "name":
            raise UsageError(f"--pruner {text}: not of the form NAME:FIELD=VALUE[,FIELD=VALUE...]")
        values[field.strip()] = value.strip()
    try:
        return PrunerSpec.model_validate(values)
    except ValidationError as error:
        fields = ", ".join(field for field in PrunerSpec.model_fields if field != "name")
        raise UsageError(
            "; ".join(describe(error, f"--pruner {text}")),
            f"pruners: median, percentile, hyperband, none; fields: {fields}",
        ) from error


def default_pruners(declared: PrunerSpec, compare_at: str | None) -> list[PrunerSpec]:
    """The study's own pruner, then all three with its settings; none twice."""
    comparisons = COMPARISONS if compare_at is None else (compare_at,)
    others = [
        declared.model_copy(update={"name": name, "compare_at": comparison})
        for name in PRUNERS
        for comparison in comparisons
    ]
    return list(dict.fromkeys([declared, *others]))


def replay_records(
    spec: StudySpec, records: Sequence[TrialRecord], pruners: Sequence[PrunerSpec],
    progress: Progress | None = None,
) -> Replay:  # fmt: skip
    """Feeds the records, in trial order, to each pruner; `spec.name` is the stored study's name."""
    used = [record for record in records if _replayable(record)]
    winner = best_record(list(records))
    outcomes = []
    for number, declared in enumerate(pruners):
        if progress:
            progress("replaying", number, len(pruners))
        ended = _run(spec.model_copy(update={"pruner": declared}), records)
        outcomes.append(_outcome(declared, ended, winner))
    if progress:
        progress("replaying", len(pruners), len(pruners))
    return Replay(
        study=spec.name, trials=len(used), cut_short=sum(record.state == "pruned" for record in used),
        epochs=sum(len(record.epochs) for record in used), seconds=sum(record.seconds for record in used),
        winner=winner.number if winner else None, winner_value=winner.value if winner else None,
        pruners=tuple(outcomes),
    )  # fmt: skip


def _replayable(record: TrialRecord) -> bool:
    """Failed trials were run again under another number; running ones have no end yet."""
    return record.state in ("complete", "pruned") and bool(record.epochs)


def _run(spec: StudySpec, records: Sequence[TrialRecord]) -> list[_Ended]:
    """One search in memory, with the pruner of `spec`.

    Study name and trial numbers are the stored ones, because Hyperband picks a trial's bracket by them.
    """
    import optuna

    optuna.logging.set_verbosity(logging.WARNING)
    study = optuna.create_study(study_name=spec.name, direction="maximize", pruner=make_pruner(spec))
    published = {row.name for row in spec.baselines if row.published.has_figures}
    ended = []
    for record in sorted(records, key=lambda record: record.number):
        trial = study.ask()
        while trial.number < record.number:  # a record that was not given keeps its number all the same
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            trial = study.ask()
        if not _replayable(record):
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            continue
        at = _pruned_at(trial, record, spec.pruner, exempt=record.baseline in published)
        ended.append(_Ended(record, at))
        if ended[-1].finished:
            study.tell(trial, record.value)
        else:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    return ended


def _pruned_at(trial: optuna.Trial, record: TrialRecord, declared: PrunerSpec, *, exempt: bool) -> int | None:
    """The epoch at which the pruner ends the trial, asked as by the supervisor of one worker.

    A trial that lagged is asked in its last stored epoch too, so that the pruner which ended it does so
    again; one that diverged there is not.
    """
    last = record.epochs[-1].epoch
    epochs = record.recipe.epochs if record.recipe else last
    diverged = record.stop_reason.startswith(DIVERGED)
    for count, result in enumerate(record.epochs, start=1):
        spared = exempt or (diverged and result.epoch == last)
        report(trial, record.epochs[:count], epochs, declared)
        if not spared and lags(trial, record.epochs[:count], epochs, declared):
            return result.epoch
    return None


def _outcome(declared: PrunerSpec, ended: Sequence[_Ended], winner: TrialRecord | None) -> PrunerReplay:
    epochs = sum(len(one.record.epochs) for one in ended)
    saved = sum(one.epochs_saved for one in ended)
    best = best_record([one.record for one in ended if one.finished])
    lost = [one.at for one in ended if winner is not None and one.record.number == winner.number]
    regret = None
    if best is not None and winner is not None:
        regret = (winner.value or 0.0) - (best.value or 0.0)
    return PrunerReplay(
        pruner=declared,
        trials_pruned=sum(one.at is not None for one in ended),
        epochs_saved=saved,
        share_saved=saved / epochs if epochs else 0.0,
        seconds_saved=sum(one.seconds_saved for one in ended),
        winner_pruned_at=lost[0] if lost else None,
        best_trial=best.number if best else None,
        best_value=best.value if best else None,
        regret=regret,
    )
