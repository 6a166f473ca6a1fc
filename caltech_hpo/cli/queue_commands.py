"""`submit`, `cancel`, `status`, `serve`: one machine that works for several people."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape

from caltech_hpo.cli.dashboard_commands import AllowHost, Host, Port, Writable, open_dashboard
from caltech_hpo.cli.display import percent
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
    place_of,
    say,
)
from caltech_hpo.cli.search_commands import parse_params
from caltech_hpo.cli.stopping import StopSignals
from caltech_hpo.cli.tables import table_of

if TYPE_CHECKING:
    from caltech_hpo.results.status import Status
    from caltech_hpo.results.work_queue import Submission

REFRESH = 2.0  # seconds
NO_SERVE = "nothing works on the queue now: 'caltech-hpo serve' does"
NO_FILES = ("none", "imagenet")  # of --weights
Number = Annotated[int, typer.Argument(min=1, help="The submission's number; 'caltech-hpo status' shows it.")]


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    for command in (submit, cancel, status, serve):
        app.command()(command)


def submit(
    study: Study,
    trials: Annotated[
        int, typer.Option(min=1, help="Finished trials that the study shall have in all.")
    ] = 40,
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**32 - 1, help="Seed of the sampler and of training.")
    ] = None,
    enqueue: Annotated[
        list[str] | None,
        typer.Option(
            help="Run these parameters first: NAME=VALUE[,NAME=VALUE...]; may be repeated.", metavar="PARAMS"
        ),
    ] = None,
    no_baselines: Annotated[bool, typer.Option("--no-baselines", help="Skip the hand-tuned rows.")] = False,
    weights: Annotated[
        str | None, typer.Option(help="none, imagenet or a file, in place of the study's.")
    ] = None,
    skip_unreadable: Skip = False,
    home: Home = DEFAULT_HOME,
    storage: Storage = None,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Put a search into the queue that 'serve' works on.

    What 'search' would refuse at once is refused here. The search runs in serve's folder, with its
    study files.

    Example: caltech-hpo submit --study alexnet-scratch --trials 40
    """
    from caltech_hpo.results.work_queue import Options
    from caltech_hpo.results.work_queue import submit as submitted
    from caltech_hpo.search.locks import SERVE, holders_of
    from caltech_hpo.search.request import SearchRequest, resolve_spec

    if weights is not None and weights not in NO_FILES:
        weights = str(Path(weights).absolute())  # serve's folder may be another
    resolve_spec(SearchRequest(study, trials, enqueue=parse_params(enqueue or []), weights=weights))
    options = Options(
        data=None if data is None else str(data.absolute()), weights=weights, seed=seed,
        enqueue=tuple(enqueue or ()), baselines=not no_baselines, skip_unreadable=skip_unreadable,
    )  # fmt: skip
    place = place_of(home, storage)
    made = submitted(place.storage, study, trials, options)
    if not holders_of(place.storage, place.home, [SERVE]):
        say(NO_SERVE)
    answer(
        made.model_dump(mode="json"), as_json,
        f"submission {made.id}: study {study}, {trials} trials; 'serve' runs it, 'status' shows it",
    )  # fmt: skip


def cancel(number: Number, home: Home = DEFAULT_HOME, storage: Storage = None, as_json: Json = False) -> None:
    """Take a search out of the queue; one that runs is ended by 'serve', and its trials stay.

    Example: caltech-hpo cancel 3
    """
    from caltech_hpo.results.work_queue import cancel as cancelled

    made = cancelled(place_of(home, storage).storage, number)
    words = "cancelled" if made.ended else "is being ended"
    answer(made.model_dump(mode="json"), as_json, f"submission {number}: study {made.study} {words}")


def status(
    watch: Annotated[bool, typer.Option("--watch", help="Again and again, until Ctrl-C.")] = False,
    home: Home = DEFAULT_HOME,
    storage: Storage = None,
    as_json: Json = False,
) -> None:
    """Show the queue, the studies, who works on them, and the trials that have begun and not ended.

    Example: caltech-hpo status --watch
    """
    from caltech_hpo.results.status import read_status
    from caltech_hpo.search.storage import has_database
    from caltech_hpo.search.urls import shown

    place = place_of(home, storage)
    if not has_database(place.storage):
        say(f"there is no study database yet: {shown(place.storage)}")
    if not watch:
        made = read_status(place)
        answer(made.model_dump(mode="json"), as_json, _status(made))
        return
    with Live(_status(read_status(place)), console=Console(), auto_refresh=False) as live:
        while True:
            time.sleep(REFRESH)
            live.update(_status(read_status(place)), refresh=True)


def _status(made: Status) -> RenderableType:
    from caltech_hpo.study_files import base_name

    queue = table_of(
        ["submission", "study", "trials", "state", "by", "since (UTC)", "note"],
        [_queued(one) for one in made.queue],
        left=("study", "state", "by", "note"),
    )
    studies = table_of(
        ["study", "finished", "failed", "best validation", "trials begun", "searched by"],
        [
            [
                one.study, str(one.finished), str(one.failed),
                "-" if one.best_trial is None else f"{percent(one.best)} (trial {one.best_trial})",
                ", ".join(
                    f"trial {run.number}: epoch {run.epoch}/{run.epochs}, {percent(run.validation)}"
                    for run in one.running
                ),
                one.searched_by or ("nobody: waiting" if one.running else "-"),
            ]
            for one in made.studies
        ],
        left=("study", "trials begun", "searched by"),
    )  # fmt: skip
    parts: list[RenderableType] = [
        queue if made.queue else "the queue is empty: 'caltech-hpo submit' fills it"
    ]
    if made.served_by:
        parts.append(escape(f"serve: {made.served_by}"))
    elif any(not one.ended for one in made.queue):
        parts.append(NO_SERVE)
    parts += [studies] if made.studies else []
    training = [(f"confirm of {one.study}", one.confirmed_by) for one in made.studies]
    training += [(f"final of {base_name(one.study)}", one.final_by) for one in made.studies]
    parts += [escape(f"{what}: {who}") for what, who in dict.fromkeys(training) if who]
    return Group(*parts)


def _queued(one: Submission) -> list[str]:
    state = "ending" if one.cancel and not one.ended else one.state
    since = one.ended_at or one.began_at or one.submitted_at
    return [str(one.id), one.study, str(one.trials), state, one.submitted_by, since[:19], one.message]


def serve(
    workers: Annotated[int, typer.Option(min=1, max=256, help="Processes that train at once.")] = 1,
    device: Device = "auto",
    host: Host = "127.0.0.1",
    port: Port = 8080,
    writable: Writable = False,
    allow_host: AllowHost = None,
    home: Home = DEFAULT_HOME,
    storage: Storage = None,
) -> None:
    """Run what is submitted, search after search, and show the dashboard, until Ctrl-C or SIGTERM.

    One machine for a lab: others 'submit' to the same home or database. A search that is ended with
    serve goes on, in mid-trial, when serve does. Each search's output: logs/submission-N.log in the home.

    Example: caltech-hpo serve --workers 2
    """
    from caltech_hpo.results.dashboard import serve as serve_pages
    from caltech_hpo.results.service import Service
    from caltech_hpo.search.locks import serve_lock

    place = place_of(home.absolute(), storage)
    stop = StopSignals("stopping: the search saves a checkpoint and pauses; once more stops at once")
    with serve_lock(place.storage, place.home), stop.caught():
        application, listening = open_dashboard(place, host, port, allow_host, writable=writable)
        pages = threading.Thread(
            target=serve_pages, args=(application, listening), kwargs={"writable": writable}, daemon=True
        )
        pages.start()
        say("waiting for submissions; 'caltech-hpo submit --study NAME --trials N' adds one")
        Service(place, workers, device, say).run(stop.asked)
    say("stopped; the same command goes on from here")
    raise typer.Exit(stop.exit_code)
