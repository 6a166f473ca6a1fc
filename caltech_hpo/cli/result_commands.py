"""`final`, `report`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from caltech_hpo.cli.final_tables import final_text, seeds_text
from caltech_hpo.cli.options import (
    DEFAULT_HOME,
    STDERR,
    Data,
    Device,
    Home,
    Json,
    Memory,
    Skip,
    Storage,
    Study,
    answer,
    goes_on,
    place_of,
    progress_bars,
    say,
)
from caltech_hpo.cli.overview import AllStudies, OneStudy, Output, check_choice, report_all
from caltech_hpo.cli.tables import report_table
from caltech_hpo.cli.trainings_view import TrainingsView, training_name
from caltech_hpo.units import bytes_of

if TYPE_CHECKING:
    from caltech_hpo.cli.display import ProgressBars
    from caltech_hpo.results.ledger import FinalResult
    from caltech_hpo.results.plan import FinalPlan
    from caltech_hpo.results.retraining import (
        FinalEvent,
        RetrainingEpoch,
        RetrainingStarted,
        RetrainingUnderway,
        Scored,
        ScoringStarted,
    )


class FitOnChoice(StrEnum):
    """For --fit-on."""

    train = "train"
    both = "train+val"


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    for command in (final, report):
        app.command()(command)


def final(
    study: Study,
    fit_on: Annotated[
        FitOnChoice,
        typer.Option(help="train keeps the best validation epoch; train+val runs that many epochs."),
    ] = FitOnChoice.train,
    seeds: Annotated[
        int, typer.Option(min=1, max=100, help="Trainings: the trial's seed and the numbers after it.")
    ] = 1,
    trial: Annotated[
        int | None, typer.Option(min=0, help="Another trial than the winner.", show_default="the winner")
    ] = None,
    again: Annotated[
        str | None,
        typer.Option(help="Why another configuration of the study shall be scored.", metavar="REASON"),
    ] = None,
    allow_leak: Annotated[
        bool,
        typer.Option("--allow-leak", help="Score though test images are training or validation images too."),
    ] = False,
    retrain: Annotated[
        bool,
        typer.Option("--retrain", help="Train lost weights of a scored recipe again; nothing is scored."),
    ] = False,
    workers: Annotated[
        int, typer.Option(min=1, max=256, help="Processes that train at once, a seed each.")
    ] = 1,
    device: Device = "auto",
    memory: Memory = None,
    skip_unreadable: Skip = False,
    home: Home = DEFAULT_HOME,
    storage: Storage = None,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Retrain the winner's configuration and score the test set, once.

    Writes weights, description, metrics, curves and confusion matrix into the home. A recipe that was
    scored before is not scored again: its stored result is shown. Another configuration of the same
    study is refused without a reason (--again): choosing between test scores is a search on the test set.

    Example: caltech-hpo final --study alexnet-scratch
    """
    from caltech_hpo.results.plan import plan_finals
    from caltech_hpo.results.retraining import run_finals

    place = place_of(home, storage, data)
    with goes_on(), progress_bars() as bars:
        plans = plan_finals(
            study, place, fit_on=fit_on.value, seeds=seeds, trial=trial, again=again, retrain=retrain,
            progress=bars, say=say,
        )  # fmt: skip
        say(f"study {study}: trial {plans[0].record.number}, {plans[0].choice}")
        events = run_finals(
            plans, device=device, workers=workers, memory=bytes_of(memory), retrain=retrain,
            skip_unreadable=skip_unreadable, allow_leak=allow_leak, progress=bars, say=say,
        )  # fmt: skip
        with contextlib.closing(events):
            results = _shown(events, workers, bars)
    _answer_final(plans, [results[plan.recipe.hash] for plan in plans], as_json)


def _answer_final(plans: list[FinalPlan], results: list[FinalResult], as_json: bool) -> None:
    from caltech_hpo.results import ledger
    from caltech_hpo.results.seeds import over_seeds

    first, folders = plans[0], [plan.folder for plan in plans]
    uses = len(ledger.family_scores(first.place.storage, first.study))
    if len(results) == 1:
        text = final_text(results[0], first.choice, uses, folders[0])
        answer(_document(results[0], folders[0]), as_json, text)
    else:
        made = over_seeds(results)
        document = made.model_dump(mode="json")
        document["results"] = [_document(one, where) for one, where in zip(results, folders, strict=True)]
        answer(document, as_json, seeds_text(made, first.choice, uses, folders))


def _document(result: FinalResult, folder: Path) -> dict[str, Any]:
    """The result as JSON; its model's file is where it is now, null where it is gone."""
    from caltech_hpo.results.model_files import WEIGHTS, has_weights

    model = str(folder / WEIGHTS) if has_weights(folder) else None
    return {**result.model_dump(mode="json"), "model": model}


def _shown(events: Iterator[FinalEvent], workers: int, bars: ProgressBars) -> dict[str, FinalResult]:
    """Shows what happens; returns the results by their recipes' hashes."""
    from caltech_hpo.results.retraining import RetrainingPlanned, Scored

    results, view = {}, None
    with contextlib.ExitStack() as shown:
        for event in events:
            bars.close()
            if isinstance(event, RetrainingPlanned):
                names = [training_name(plan.record.number, plan.recipe) for plan in event.plans]
                epochs = sum(plan.recipe.epochs for plan in event.plans)
                view = TrainingsView(STDERR, names, epochs, workers)
                shown.enter_context(view.shown())
            elif isinstance(event, Scored):
                results[event.plan.recipe.hash] = event.result
                if event.how in ("before", "lost"):
                    _say_scored(event, say if view is None else view.tell)
            else:
                assert view is not None, "what is trained was said before"
                _show(view, event)
    return results


def _show(
    view: TrainingsView, event: RetrainingStarted | RetrainingUnderway | RetrainingEpoch | ScoringStarted
) -> None:
    from caltech_hpo.results.retraining import RetrainingEpoch, RetrainingStarted, RetrainingUnderway

    plan, name = event.plan, training_name(event.plan.record.number, event.plan.recipe)
    if isinstance(event, RetrainingStarted):
        view.started(name, plan.recipe.epochs, resumed=event.resumed, lost=event.lost)
    elif isinstance(event, RetrainingUnderway):
        view.underway(name, event.part, plan.recipe.epochs)
    elif isinstance(event, RetrainingEpoch):
        view.epoch(name, event.result, plan.recipe.epochs, before=event.before)
    else:
        view.tell(f"scoring {name} on the test set")


def _say_scored(event: Scored, say: Callable[[str], None]) -> None:
    name = training_name(event.plan.record.number, event.plan.recipe)
    say(f"{name} was scored before; the test set is not used again")
    if event.how == "lost":
        gone = f"its weights are no longer in {event.plan.folder}"
        say(f"{gone}; --retrain trains them again, and scores nothing")


def report(
    study: OneStudy = None,
    everything: AllStudies = False,
    output: Output = None,
    home: Home = DEFAULT_HOME,
    storage: Storage = None,
    as_json: Json = False,
) -> None:
    """Show a study's table beside the report's published values, and draw its curves.

    With --all, write a page of all studies instead: report.md and report.html, which needs no network.

    Example: caltech-hpo report --study alexnet-scratch
    """
    check_choice(study, everything, output)
    if study is None:
        report_all(place_of(home, storage), output, as_json)
        return
    from caltech_hpo.results.report import make_report

    made = make_report(study, place_of(home, storage))
    answer(made.model_dump(mode="json"), as_json, report_table(made))
