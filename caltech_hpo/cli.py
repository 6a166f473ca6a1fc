"""The command line. With display.py the only place that prints."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from caltech_hpo import __version__
from caltech_hpo.display import ProgressBars, SearchView
from caltech_hpo.errors import CaltechHpoError, UsageError
from caltech_hpo.search.run import Place

if TYPE_CHECKING:
    from caltech_hpo.search.records import TrialRecord

app = typer.Typer(
    name="caltech-hpo", no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False,
    help="Searches hyperparameters of image classifiers, shows the trials, and tests the best one, once.",
)  # fmt: skip
INTERRUPTED = 130

Home = Annotated[Path, typer.Option("--home", envvar="CALTECH_HPO_HOME", help="Folder for everything that is kept.")]
Storage = Annotated[
    str | None,
    typer.Option("--storage", envvar="CALTECH_HPO_STORAGE", help="Database URL.", show_default="SQLite in the home"),
]
Data = Annotated[
    Path | None,
    typer.Option("--data", envvar="CALTECH_HPO_DATA", help="Folder of images, one sub-folder for each class."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, nothing else there.")]
Study = Annotated[str, typer.Option("--study", help="Study name; see 'caltech-hpo studies'.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:K or mps.")]
Skip = Annotated[bool, typer.Option("--skip-unreadable", help="Leave out images that cannot be decoded.")]
DEFAULT_HOME = Path("storage")


def place_of(home: Path, storage: str | None, data: Path | None = None) -> Place:
    """Where this call keeps and finds things."""
    from caltech_hpo.search.storage import default_url

    return Place(home, storage or default_url(home), data)


def stderr() -> Console:
    """Messages and progress go here."""
    return Console(stderr=True)


def say(text: str) -> None:
    """One plain line on stderr."""
    Console(stderr=True).print(text, markup=False, highlight=False, soft_wrap=True)


def answer(document: Any, as_json: bool, human: Any) -> None:
    """Prints the JSON document, or what a person wants to read, on stdout."""
    if as_json:
        sys.stdout.write(json.dumps(document, indent=2, allow_nan=False) + "\n")
    else:
        Console(soft_wrap=isinstance(human, str)).print(human, highlight=False)


def parse_params(texts: list[str]) -> tuple[dict[str, Any], ...]:
    """["learning_rate=1.0,epochs=30"] to [{"learning_rate": 1.0, "epochs": 30}]. Raises UsageError."""
    parsed = []
    for text in texts:
        pairs = [pair.partition("=") for pair in text.split(",")]
        if not all(name and mark and value for name, mark, value in pairs):
            raise UsageError(f"--enqueue {text}: not NAME=VALUE[,NAME=VALUE...]")
        parsed.append({name.strip(): _value(value.strip()) for name, _, value in pairs})
    return tuple(parsed)


def _value(text: str) -> str | int | float:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


@app.command()
def search(
    study: Study,
    trials: Annotated[int, typer.Option("--trials", min=1, help="Finished trials that the study shall have.")] = 40,
    workers: Annotated[int, typer.Option("--workers", min=1, max=256, help="Processes that train at once.")] = 1,
    device: Device = "auto",
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**32 - 1, help="Seed of sampler and training.")] = 0,
    timeout: Annotated[
        float | None, typer.Option("--timeout", min=0.01, help="Minutes after which no new trial begins.")
    ] = None,
    no_baselines: Annotated[bool, typer.Option("--no-baselines", help="Skip the hand-tuned rows.")] = False,
    enqueue: Annotated[
        list[str] | None,
        typer.Option("--enqueue", help="Run these parameters next: NAME=VALUE,NAME=VALUE; repeatable."),
    ] = None,
    precision: Annotated[str | None, typer.Option("--precision", help="auto, bf16 or fp32.")] = None,
    weights: Annotated[str | None, typer.Option("--weights", help="none, imagenet, or a weights file.")] = None,
    allow_changed: Annotated[bool, typer.Option("--allow-changed", help="Continue a changed study.")] = False,
    skip_unreadable: Skip = False,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="Prove the study on this machine: 2 short trials, nothing kept.")
    ] = False,
    home: Home = DEFAULT_HOME,
    storage: Storage = None,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Search hyperparameters; the same command again continues where the study stands."""
    import contextlib

    from caltech_hpo.search import run as runs

    if precision not in (None, "auto", "bf16", "fp32"):
        raise UsageError(f"--precision {precision}: unknown", "use auto, bf16 or fp32")
    request = runs.SearchRequest(
        study=study, trials=trials, workers=workers, device=device, seed=seed, timeout_minutes=timeout,
        baselines=not no_baselines, enqueue=parse_params(enqueue or []), allow_changed=allow_changed,
        skip_unreadable=skip_unreadable, precision=precision, weights=weights,  # type: ignore[arg-type]
    )  # fmt: skip
    place = place_of(home, storage, data)
    with contextlib.ExitStack() as stack:
        if smoke:
            request, place = stack.enter_context(runs.smoke(request, place))
        bars = ProgressBars(stderr())
        stack.callback(bars.close)
        opened = stack.enter_context(runs.open_search(request, place, progress=bars, say=say))
        bars.close()
        follow(opened, request, workers)
        conclude(request, place, as_json=as_json)


def follow(opened: Any, request: Any, workers: int) -> None:
    """Shows the search while it runs."""
    from caltech_hpo.search.records import finished_count

    done = finished_count(opened.records)
    if opened.device:
        say(f"study {request.study}: {done} of {request.trials} trials finished; training on {opened.device}")
    else:
        say(f"study {request.study} has its {done} finished trials already (asked: {request.trials}); nothing to do")
    view = SearchView(stderr(), request.study, request.trials, opened.records, workers)
    with view.shown():
        for event in opened.events:
            view.handle(event)


def conclude(request: Any, place: Place, *, as_json: bool) -> None:
    """The answer of `search`: counts and the best trial."""
    from caltech_hpo.search.records import best_record, trial_records
    from caltech_hpo.search.storage import find_study, open_storage, shown

    stored = find_study(open_storage(place.storage), request.study)
    records = trial_records(stored) if stored else []
    counts = {state: sum(r.state == state for r in records) for state in ("complete", "pruned", "failed")}
    best = best_record(records)
    document = {
        "study": request.study, "trials": request.trials, "finished": counts["complete"] + counts["pruned"],
        **counts, "best": record_json(best), "storage": shown(place.storage),
    }  # fmt: skip
    text = f"{document['finished']} trials finished: {counts['complete']} complete, {counts['pruned']} pruned, {counts['failed']} failed"
    if best:
        text += f"\nbest: trial {best.number}, validation {best.value:.4f} at epoch {best.best_epoch}: {best.params}"
    answer(document, as_json, text)


def record_json(record: TrialRecord | None) -> dict[str, Any] | None:
    """A trial for --json."""
    if record is None:
        return None
    return {
        "trial": record.number, "params": record.params, "val_accuracy": record.value,
        "best_epoch": record.best_epoch, "final_loss": record.final_loss,
    }  # fmt: skip


def main() -> None:
    """The console script: turns our errors into one message and their exit code."""
    try:
        app(standalone_mode=True)
    except CaltechHpoError as error:
        say(f"error: {error}")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        say("interrupted; the same command goes on from here")
        sys.exit(INTERRUPTED)


@app.command(hidden=True)
def version() -> None:
    """Print the version."""
    answer(__version__, False, __version__)
