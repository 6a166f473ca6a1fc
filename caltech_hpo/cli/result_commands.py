"""`final`, `report`, `dashboard`."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from caltech_hpo.cli import INTERRUPTED
from caltech_hpo.cli.display import EpochView
from caltech_hpo.cli.options import (
    DEFAULT_HOME,
    Data,
    Device,
    Home,
    Json,
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
from caltech_hpo.cli.tables import final_text, report_table

if TYPE_CHECKING:
    from caltech_hpo.results.final import FinalPlan, FinalResult


class FitOnChoice(StrEnum):
    """For --fit-on."""

    train = "train"
    both = "train+val"


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    for command in (final, report, dashboard):
        app.command()(command)


def final(
    study: Study,
    fit_on: Annotated[
        FitOnChoice,
        typer.Option(help="train keeps the best validation epoch; train+val runs that many epochs."),
    ] = FitOnChoice.train,
    device: Device = "auto",
    skip_unreadable: Skip = False,
    home: Home = DEFAULT_HOME,
    storage: Storage = None,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Retrain the best trial's configuration and score the test set, once.

    Writes weights, description, metrics, curves and confusion matrix into the home. A configuration
    that was scored before is not scored again: its stored result is shown.

    Example: caltech-hpo final --study alexnet-scratch
    """
    from caltech_hpo.results.final import plan_final

    place = place_of(home, storage, data)
    with goes_on(), progress_bars() as bars:
        plan = plan_final(study, place, fit_on=fit_on.value, progress=bars, say=say)
    if plan.stored is not None:
        say(f"trial {plan.record.number} was scored before; the test set is not used again")
        if not plan.folder.is_dir():
            say(f"its files are no longer in {plan.folder}")
    result = plan.stored or _retrain_and_score(plan, device, skip_unreadable)
    answer(result.model_dump(mode="json"), as_json, final_text(result, plan.folder))


def _retrain_and_score(plan: FinalPlan, device: str, skip_unreadable: bool) -> FinalResult:
    from caltech_hpo.results.final import final_lock

    say(
        f"retraining trial {plan.record.number} of study {plan.study.study_name} on {plan.recipe.fit_on}, "
        f"{plan.recipe.epochs} epochs"
    )
    with goes_on(), final_lock(plan) as taken:
        return taken or _train_and_score(plan, device, skip_unreadable)


def _train_and_score(plan: FinalPlan, device: str, skip_unreadable: bool) -> FinalResult:
    from caltech_hpo.results.final import retrain, score

    view = EpochView(Console(stderr=True), plan.recipe.epochs)
    with progress_bars() as bars, view.shown():
        epochs = []
        for result in retrain(plan, device=device, skip_unreadable=skip_unreadable, progress=bars):
            bars.close()
            view.handle(result)
            epochs.append(result)
    say("scoring the test set")
    with progress_bars() as bars:
        return score(plan, epochs, device=device, skip_unreadable=skip_unreadable, progress=bars)


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


def dashboard(
    host: Annotated[str, typer.Option(help="Address to listen on; there is no password.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8080,
    home: Home = DEFAULT_HOME,
    storage: Storage = None,
) -> None:
    """Serve optuna-dashboard on the study database until Ctrl-C.

    Example: caltech-hpo dashboard --port 8080
    """
    from caltech_hpo.results.dashboard import bind, make_app, serve

    place = place_of(home, storage)
    application = make_app(place.storage, place.home / "artifacts")
    listening = bind(host, port)
    if host not in ("127.0.0.1", "localhost", "::1"):
        say(f"warning: anyone who reaches {host} can read and change every study: there is no password")
    shown = f"[{host}]" if ":" in host else host
    say(f"dashboard: http://{shown}:{listening.getsockname()[1]}/  (Ctrl-C ends it)")
    serve(application, listening)  # returns on Ctrl-C
    raise typer.Exit(INTERRUPTED)
