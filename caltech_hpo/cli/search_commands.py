"""`search`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from caltech_hpo.cli.display import short_params
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
    this_command,
)
from caltech_hpo.cli.plan_commands import forecast_line
from caltech_hpo.cli.search_view import SearchView
from caltech_hpo.cli.stopping import StopSignals
from caltech_hpo.cli.tables import record_json
from caltech_hpo.errors import UsageError
from caltech_hpo.units import bytes_of

if TYPE_CHECKING:
    from caltech_hpo.search.events import SearchEvent
    from caltech_hpo.search.request import Cluster, Place, SearchRequest
    from caltech_hpo.search.run import Search

    Handle = Callable[[SearchEvent], None]


class EngineChoice(StrEnum):
    """For --engine."""

    local = "local"
    ray = "ray"


class PrecisionChoice(StrEnum):
    """For --precision."""

    auto = "auto"
    bf16 = "bf16"
    fp32 = "fp32"


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command()(search)


def search(
    study: Study,
    trials: Annotated[
        int, typer.Option(min=1, help="Finished trials that the study shall have in all.")
    ] = 40,
    workers: Annotated[int, typer.Option(min=1, max=256, help="Processes that train at once.")] = 1,
    device: Device = "auto",
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the sampler and of training.")] = 0,
    timeout: Annotated[
        float | None, typer.Option(min=0.01, help="Minutes after which no trial begins.")
    ] = None,
    trial_timeout: Annotated[
        float | None, typer.Option(min=0.01, help="Minutes after which a trial ends with its next epoch.")
    ] = None,
    no_baselines: Annotated[bool, typer.Option("--no-baselines", help="Skip the hand-tuned rows.")] = False,
    no_pruning: Annotated[
        bool, typer.Option("--no-pruning", help="No trial ends for lagging in this run; see 'replay'.")
    ] = False,
    enqueue: Annotated[
        list[str] | None,
        typer.Option(help="Run these next: NAME=VALUE[,NAME=VALUE...]; may be repeated.", metavar="PARAMS"),
    ] = None,
    precision: Annotated[PrecisionChoice | None, typer.Option(help="In place of the study's.")] = None,
    weights: Annotated[
        str | None, typer.Option(help="none, imagenet or a file, in place of the study's.")
    ] = None,
    engine: Annotated[
        EngineChoice, typer.Option(help="Where workers run: processes of this machine, or a Ray cluster.")
    ] = EngineChoice.local,
    ray_address: Annotated[
        str | None,
        typer.Option(
            help="The Ray cluster's address; auto finds one that runs here.",
            show_default="one that is started on this machine",
        ),
    ] = None,
    gpus_per_worker: Annotated[
        float, typer.Option(min=0.0, help="Share of GPUs that a worker takes of the cluster.")
    ] = 0.0,
    cpus_per_worker: Annotated[
        float, typer.Option(min=0.1, help="CPU cores that a worker takes of the cluster.")
    ] = 1.0,
    memory: Memory = None,
    tensorboard: Annotated[
        Path | None, typer.Option(help="Write each trial's curves for TensorBoard into this folder, too.")
    ] = None,
    allow_changed: Annotated[
        bool, typer.Option("--allow-changed", help="Continue though the study file changed.")
    ] = False,
    skip_unreadable: Skip = False,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="Prove the study on this machine: 2 short trials, nothing kept.")
    ] = False,
    home: Home = DEFAULT_HOME,
    storage: Storage = None,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Search hyperparameters. The same command again goes on where the study stands.

    --trials counts complete and pruned trials over all runs of the command. The study's
    hand-tuned baselines run first.

    Example: caltech-hpo search --study alexnet-scratch --trials 40
    """
    from caltech_hpo.search.request import SearchRequest
    from caltech_hpo.search.run import open_search
    from caltech_hpo.search.smoke import smoke as prepare_smoke

    request = SearchRequest(
        study=study, trials=trials, workers=workers, device=device, seed=seed, timeout_minutes=timeout,
        baselines=not no_baselines, pruning=not no_pruning, enqueue=parse_params(enqueue or []),
        allow_changed=allow_changed, skip_unreadable=skip_unreadable,
        precision=precision.value if precision else None, weights=weights,
        memory=bytes_of(memory), trial_minutes=trial_timeout,
        cluster=cluster_of(engine, ray_address, gpus_per_worker, cpus_per_worker),
    )  # fmt: skip
    place = place_of(home, storage, data)
    with goes_on(kept=not smoke), contextlib.ExitStack() as stack:
        if smoke:
            request, place = stack.enter_context(prepare_smoke(request, place))
        stop = StopSignals()
        with progress_bars() as bars:
            opened = stack.enter_context(open_search(request, place, progress=bars, say=say, stop=stop.asked))
        also = stack.enter_context(tensorboard_log(tensorboard, study)) if opened.device else None
        with stop.caught():
            follow(opened, request, also)
        if stop.asked():
            say(f"paused; the same command goes on from here: {this_command()}")
            raise typer.Exit(stop.exit_code)
        conclude(request, place, smoke=smoke, as_json=as_json)


def cluster_of(engine: EngineChoice, address: str | None, gpus: float, cpus: float) -> Cluster | None:
    """The cluster that the options describe; None for this machine. Raises UsageError for loose options."""
    from caltech_hpo.search.request import Cluster

    if engine == EngineChoice.ray:
        return Cluster(address, gpus, cpus)
    if address is not None or gpus or cpus != 1.0:
        raise UsageError("--ray-address and shares of a cluster are for --engine ray", "add --engine ray")
    return None


def parse_params(texts: list[str]) -> tuple[dict[str, Any], ...]:
    """["learning_rate=1.0,epochs=30"] to [{"learning_rate": 1.0, "epochs": 30}]. Raises UsageError."""
    parsed = []
    for text in texts:
        pairs = [pair.partition("=") for pair in text.split(",")]
        if not all(name.strip() and mark and value.strip() for name, mark, value in pairs):
            raise UsageError(f"--enqueue {text}: not of the form NAME=VALUE[,NAME=VALUE...]")
        parsed.append({name.strip(): _number_or_text(value.strip()) for name, _, value in pairs})
    return tuple(parsed)


def _number_or_text(text: str) -> str | bool | int | float:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


@contextlib.contextmanager
def tensorboard_log(folder: Path | None, study: str) -> Iterator[Handle | None]:
    """What takes in the events for TensorBoard; None where that was not asked for."""
    if folder is None:
        yield None
        return
    from caltech_hpo.results.tensorboard import TensorBoardLog

    with contextlib.closing(TensorBoardLog(folder, study)) as log:
        yield log.handle


def follow(opened: Search, request: SearchRequest, also: Handle | None = None) -> None:
    """Shows the search while it runs; `also` is told every event."""
    if not opened.device:
        say(
            f"study {request.study} has {opened.finished} finished trials already (asked: {request.trials}); "
            f"nothing to do" + ("; raise --trials to run what is to be queued" if request.enqueue else "")
        )
        return
    say(
        f"study {request.study}: {opened.finished} of {request.trials} trials finished; "
        f"training on {opened.device}"
    )
    found = opened.forecaster.forecast(request.trials) if opened.forecaster else None
    if found:
        say(forecast_line(found))
    view = SearchView(STDERR, request.study, request.trials, opened.records, opened.forecaster)
    with view.shown():
        for event in opened.events:
            view.handle(event)
            if also:
                also(event)


def conclude(request: SearchRequest, place: Place, *, smoke: bool, as_json: bool) -> None:
    """The answer of `search`: counts, the best trial, and what to do next."""
    from caltech_hpo.search.records import best_record, trial_records
    from caltech_hpo.search.storage import find_study, open_existing
    from caltech_hpo.search.urls import shown

    stored = find_study(open_existing(place.storage), request.study)
    records = trial_records(stored) if stored else []
    counts = {state: sum(r.state == state for r in records) for state in ("complete", "pruned", "failed")}
    finished = counts["complete"] + counts["pruned"]
    best = best_record(records)
    document = {
        "study": request.study, "smoke": smoke, "trials": request.trials, "finished": finished, **counts,
        "best": record_json(best), "storage": shown(place.storage),
    }  # fmt: skip
    total = f"{finished} of {request.trials} trials finished"
    if finished > request.trials:
        total = f"{finished} trials finished (asked: {request.trials})"
    lines = [f"{total}: " + ", ".join(f"{n} {s}" for s, n in counts.items())]
    if best:
        lines.append(f"best: trial {best.number}, validation {best.value:.4f} at epoch {best.best_epoch}")
        lines.append(f"      {short_params(best.params)}")
    if smoke and finished == request.trials:
        lines.append("smoke run: nothing was kept; the study runs on this machine")
    elif best and not smoke:
        kept, data = as_given("--home", "--storage"), as_given("--data")
        lines.append(
            f"next: caltech-hpo confirm --study {request.study}{kept}{data}, then final; or look: "
            f"caltech-hpo dashboard{kept}"
        )
    answer(document, as_json, "\n".join(lines))
