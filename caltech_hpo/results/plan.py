"""What `final` is about to do: which trial, which seeds, what is scored already, what it may not score."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from caltech_hpo.data.cache import Progress
from caltech_hpo.data.dataset import DatasetIndex
from caltech_hpo.errors import UsageError
from caltech_hpo.results import ledger
from caltech_hpo.results.confirm import confirmed
from caltech_hpo.results.ledger import FinalResult, ScoreRow
from caltech_hpo.results.model_files import has_weights, kept_folder
from caltech_hpo.results.ranking import Confirmation
from caltech_hpo.results.trainings import searched_data, seeded
from caltech_hpo.search.records import TrialRecord, best_record, trial_records
from caltech_hpo.search.request import Place, Say, silent
from caltech_hpo.search.storage import stored_study
from caltech_hpo.spec import Recipe
from caltech_hpo.terms import FitOn


@dataclass(frozen=True)
class FinalPlan:
    """One training and one use of the test set.

    `stored` is the score of the same recipe, if it was taken before; the data is then not looked at,
    unless another seed needs it. `choice` says in words why it is this trial; `again` why the test
    set is to be used on another configuration ("": it is not).
    """

    study: str
    record: TrialRecord
    choice: str
    recipe: Recipe
    folder: Path
    stored: FinalResult | None
    index: DatasetIndex | None
    place: Place
    again: str = ""

    @property
    def unfinished(self) -> Path:
        """The folder being written, beside the one that it becomes."""
        return self.folder.with_name(f".{self.folder.name}.unfinished")


def plan_finals(
    name: str, place: Place, *, fit_on: FitOn = "train", seeds: int = 1, trial: int | None = None,
    again: str | None = None, retrain: bool = False, progress: Progress | None = None, say: Say = silent,
) -> list[FinalPlan]:  # fmt: skip
    """Chooses the trial and checks, before any training, that it may be scored and its data is at hand.

    One plan for each seed: the trial's own, then the numbers after it. With `retrain`, the data is also
    looked for where only the weights of a scored recipe are gone. Raises UsageError without a
    stored study or a complete trial, with `retrain` for a seed without a score, or when another configuration
    of the study was scored and `again` gives no reason; DataError for other data.
    """
    if again is not None and not again.strip():
        raise UsageError("--again: the reason is empty", 'say why, for the reports: --again "reason"')
    reason = (again or "").strip()
    study = stored_study(place.storage, name)
    records = trial_records(study)
    confirmation = confirmed(place.storage, name)
    record, choice = choose_trial(name, records, trial, confirmation)
    if trial is None and confirmation is not None:
        warn_of_gaps(name, records, confirmation, say)
    base = final_recipe(record, fit_on)
    recipes = [seeded(base, base.seed + i) for i in range(seeds)]
    folders = [place.models / f"{name}-trial{record.number}-{recipe.hash[:8]}" for recipe in recipes]
    for folder in folders:
        keep_published(name, place, record, folder)
    family = ledger.family_scores(place.storage, name)
    stored = [stored_score(family, recipe) for recipe in recipes]
    folders = [  # NAME may have been scored by NAME@2, whose trials have other numbers
        folder if score is None or score.study == name else scored_folder(score, place)
        for folder, score in zip(folders, stored, strict=True)
    ]
    index = None
    if None in stored:
        check_again(name, family, record.number, recipes[0].configuration, reason)
        if retrain:
            seed = recipes[stored.index(None)].seed
            raise UsageError(
                f"trial {record.number} seed {seed} has no score: --retrain only brings lost weights back",
                "leave --retrain out",
            )
    if None in stored or (retrain and not all(has_weights(folder) for folder in folders)):
        index = searched_data(study, place, progress=progress, say=say)
    return [
        FinalPlan(name, record, choice, recipe, folder, score, index, place, reason)
        for recipe, folder, score in zip(recipes, folders, stored, strict=True)
    ]


def choose_trial(
    name: str, records: Sequence[TrialRecord], trial: int | None, confirmation: Confirmation | None
) -> tuple[TrialRecord, str]:
    """The trial asked for, the confirmed winner, or the search's best; and why, in words.

    Raises UsageError without one.
    """
    if trial is not None:
        asked = next((record for record in records if record.number == trial), None)
        if asked is None or asked.state != "complete" or asked.recipe is None:
            what = "is not there" if asked is None else f"did not complete (it is {asked.state})"
            raise UsageError(f"trial {trial} of study '{name}' {what}", "give --trial a complete trial")
        return asked, "chosen with --trial"
    if confirmation is not None:
        confirmed_one = confirmation.winner
        winner = next((record for record in records if record.number == confirmed_one.trial), None)
        # It is another one when a study was deleted and another searched under its name.
        if winner and winner.recipe and winner.recipe.configuration == confirmed_one.configuration:
            count = len(confirmation.seeds)
            return winner, f"confirmed over {count} seed{'s' if count > 1 else ''}"
    best = best_record(list(records))
    if best is None or best.recipe is None:
        raise UsageError(
            f"study '{name}' has no complete trial yet",
            f"run 'caltech-hpo search --study {name} --trials N' first",
        )
    return best, "best of the search"


def warn_of_gaps(
    name: str, records: Sequence[TrialRecord], confirmation: Confirmation, say: Say
) -> None:  # fmt: skip
    """Says what the confirmation does not cover: seeds of an interrupted one, a better trial since."""
    if len(confirmation.seeds) < confirmation.asked_seeds:
        say(
            f"confirm of study {name} was interrupted: {len(confirmation.seeds)} of "
            f"{confirmation.asked_seeds} seeds; the same confirm goes on"
        )
    best = best_record(list(records))
    seen = {finalist.configuration for finalist in confirmation.finalists}
    if best is not None and best.recipe is not None and best.recipe.configuration not in seen:
        say(f"trial {best.number} is the search's best, but was not confirmed: run confirm again to rank it")


def final_recipe(record: TrialRecord, fit_on: FitOn) -> Recipe:
    """The trial's recipe; on training and validation images it runs to the trial's best epoch."""
    assert record.recipe is not None
    if fit_on == "train":
        return record.recipe
    return record.recipe.model_copy(update={"fit_on": fit_on, "epochs": record.best_epoch})


def stored_score(rows: Sequence[ScoreRow], recipe: Recipe) -> FinalResult | None:
    """The score that was taken of this recipe, if one was; `rows` are NAME's and all NAME@2's."""
    return next((row.result for row in rows if row.recipe_hash == recipe.hash), None)


def scored_folder(score: FinalResult, place: Place) -> Path:
    """Where the model of another study's score is, or was."""
    return kept_folder(score.model, place.models) or place.models / Path(score.model).parent.name


def check_again(
    name: str, rows: Sequence[ScoreRow], trial: int, configuration: str, again: str
) -> None:  # fmt: skip
    """Raises UsageError if other configurations were scored, this one was not, and no reason is given."""
    if again or not rows or any(row.configuration == configuration for row in rows):
        return
    last = rows[-1]
    raise UsageError(
        f"the test set of study '{name}' was used before, on another configuration: trial {last.trial} of "
        f"{last.study}, "
        f"fitted on {last.fit_on}, top-1 {last.top1:.4f}, {last.taken_at}. Choosing between scores "
        "makes a test set a second validation set",
        f"to score trial {trial} all the same, say why (that the study is on other images now, for example); "
        'every report will show it: --again "reason"',
    )


def keep_published(name: str, place: Place, record: TrialRecord, folder: Path) -> None:
    """Records the score in a finished folder, if the call that took it was ended before it could.

    Versions before the ledger recorded last.
    """
    row = read_score(folder, name, record)
    if row is not None and not any(
        known.recipe_hash == row.recipe_hash for known in ledger.scores(place.storage, name)
    ):
        ledger.record(place.storage, row)


def read_score(folder: Path, name: str, record: TrialRecord) -> ScoreRow | None:
    """The score that a folder's metrics.json holds, or None."""
    metrics = folder / "metrics.json"
    if not metrics.is_file():
        return None
    try:
        document: dict[str, Any] = json.loads(metrics.read_text(encoding="utf-8"))
    except ValueError:  # an old version's, ended in mid-write
        return None
    if "score" not in document:
        return ledger.old_row(name, FinalResult.model_validate(document["result"]), record)
    return ScoreRow.model_validate({**document["score"], "result": document["result"]})
