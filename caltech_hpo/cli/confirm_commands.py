"""`confirm`."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group
from rich.markup import escape

from caltech_hpo.cli.display import percent, short_params
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
    as_given,
    goes_on,
    place_of,
    progress_bars,
    say,
)
from caltech_hpo.cli.tables import table_of
from caltech_hpo.cli.trainings_view import TrainingsView, training_name
from caltech_hpo.units import bytes_of

if TYPE_CHECKING:
    from caltech_hpo.results.confirm import ConfirmPlan
    from caltech_hpo.results.confirm_events import ConfirmEvent
    from caltech_hpo.results.ranking import Confirmation


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command()(confirm)


def confirm(
    study: Study,
    finalists: Annotated[int, typer.Option(min=1, max=1000, help="Best configurations to retrain.")] = 3,
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="Trainings of each, on fresh seeds.")] = 3,
    workers: Annotated[int, typer.Option(min=1, max=256, help="Processes that train at once.")] = 1,
    device: Device = "auto",
    memory: Memory = None,
    skip_unreadable: Skip = False,
    home: Home = DEFAULT_HOME,
    storage: Storage = None,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Retrain the best trials over fresh seeds and rank them by their mean validation accuracy.

    The best of many noisy trials is partly luck: the optimism is what the search's best loses on seeds
    that did not choose it. Every finalist gets the same seeds. Each training is kept as it finishes;
    the same command goes on where it stopped. The test set is not used. 'final' takes the winner.

    Example: caltech-hpo confirm --study alexnet-scratch --finalists 3 --seeds 3
    """
    from caltech_hpo.results.confirm import confirmed, open_confirm, run_confirm

    place = place_of(home, storage, data)
    with goes_on(), progress_bars() as bars:
        with open_confirm(study, place, finalists=finalists, seeds=seeds, progress=bars, say=say) as plan:
            say(_announcement(plan))
            events = run_confirm(
                plan, workers=workers, device=device, memory=bytes_of(memory),
                skip_unreadable=skip_unreadable, progress=bars, say=say,
            )  # fmt: skip
            names = [training_name(one.trial, one.recipe) for one in plan.open]
            view = TrainingsView(STDERR, names, sum(one.recipe.epochs for one in plan.open), workers)
            with contextlib.closing(events), view.shown():
                for event in events:
                    bars.close()
                    _show(view, event)
        made = confirmed(place.storage, study)
    assert made is not None, "every seed is whole"
    document = made.model_dump(mode="json") | {
        "winner": made.winner.trial, "winner_mean": made.winner.mean, "winner_optimism": made.winner.optimism,
    }  # fmt: skip
    answer(document, as_json, confirmation_table(made))


def _announcement(plan: ConfirmPlan) -> str:
    total = len(plan.finalists) * len(plan.seeds)
    trials = ", ".join(str(one.trial) for one in plan.finalists)
    seeds = ", ".join(map(str, plan.seeds))
    of, on = "s" * (len(plan.finalists) > 1), "s" * (len(plan.seeds) > 1)
    text = f"study {plan.study}: trial{of} {trials} on seed{on} {seeds}: "
    done = total - len(plan.open)
    return text + (f"{done} of {total} trainings done" if plan.open else f"all {total} trainings done before")


def _show(view: TrainingsView, event: ConfirmEvent) -> None:
    from caltech_hpo.results.confirm_events import TrainingEpoch, TrainingStarted, TrainingUnderway

    recipe = event.training.recipe
    name = training_name(event.training.trial, recipe)
    if isinstance(event, TrainingStarted):
        view.started(name, recipe.epochs, resumed=event.resumed, lost=event.lost)
    elif isinstance(event, TrainingUnderway):
        view.underway(name, event.part, recipe.epochs)
    elif isinstance(event, TrainingEpoch):
        view.epoch(name, event.result, recipe.epochs, before=event.before)
    else:
        run = event.run
        text = f"{run.stop_reason}, best validation {percent(run.value)}"
        view.ended(name, text, epochs_left=recipe.epochs - run.epochs_run)


def confirmation_table(made: Confirmation) -> Group:
    """The finalists by mean, the winner and the optimism."""
    cells = []
    for one in made.finalists:
        cells.append(
            [str(one.trial), short_params(one.params), f"{one.mean:.4f}", _between(one.ci95),
             f"{one.behind:.4f}", _between(one.behind_ci95), f"{one.search_value:.4f}",
             f"{one.optimism:+.4f}", str(one.diverged or "-")]
        )  # fmt: skip
    columns = (
        "trial",
        "parameters",
        "mean",
        "95%",
        "behind",
        "95%, paired",
        "search",
        "optimism",
        "diverged",
    )
    count = len(made.seeds)
    title = f"study {made.study}: validation top-1 over {count} fresh seed{'s' if count > 1 else ''}"
    winner, best = made.winner, next(one for one in made.finalists if one.trial == made.search_best)
    lines = [
        f"winner: trial {winner.trial}, mean {winner.mean:.4f} over seeds {', '.join(map(str, made.seeds))}; "
        f"its search value {winner.search_value:.4f} was optimistic by {winner.optimism:+.4f}",
        f"optimism: the search's best, trial {best.trial}, had {best.search_value:.4f} and is confirmed at "
        f"{best.mean:.4f}: {made.optimism:+.4f}",
        f"next: caltech-hpo final --study {made.study}{as_given('--home', '--storage', '--data')}",
    ]
    close = [one.trial for one in made.finalists if one.behind_ci95 and one.behind_ci95[0] <= 0]
    if close:
        trials = f"trial {close[0]} is" if len(close) == 1 else f"trials {', '.join(map(str, close))} are"
        lines.insert(1, f"{trials} not clearly behind: the paired interval holds 0; more --seeds tell more")
    if count < 2:
        lines.insert(0, "one seed has no interval: give --seeds 2 or more")
    table = table_of(columns, cells, left=("parameters",), title=title)
    return Group(table, *(escape(line) for line in lines))


def _between(interval: tuple[float, float] | None) -> str:
    return "-" if interval is None else f"{interval[0]:.4f} to {interval[1]:.4f}"
