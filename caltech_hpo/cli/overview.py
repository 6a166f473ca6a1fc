"""The answer of `report --all`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group, RenderableType
from rich.markup import escape

from caltech_hpo.cli.display import over, percent
from caltech_hpo.cli.options import answer, goes_on, progress_bars, say
from caltech_hpo.cli.tables import table_of
from caltech_hpo.errors import StorageError, UsageError

if TYPE_CHECKING:
    from caltech_hpo.results.overview import StudySummary
    from caltech_hpo.search.request import Place

OneStudy = Annotated[
    str | None, typer.Option("--study", help="Study name; 'caltech-hpo studies' lists them.")
]
AllStudies = Annotated[bool, typer.Option("--all", help="A page of all studies, Markdown and HTML.")]
Output = Annotated[
    Path | None,
    typer.Option("--output", help="Folder for --all.", show_default="reports in the home"),
]


def check_choice(study: str | None, everything: bool, output: Path | None) -> None:
    """Raises UsageError unless exactly one of --study and --all is given, and --output only with --all."""
    if everything == (study is not None):
        raise UsageError(
            "--all and --study exclude each other" if everything else "which study?",
            "give --study NAME for one study, or --all for a page of all of them",
        )
    if output is not None and not everything:
        raise UsageError("--output is for --all", "'report --study NAME' writes its curves into the home")


def report_all(place: Place, output: Path | None, as_json: bool) -> None:
    """Writes the page of all studies and says where it is."""
    from caltech_hpo.results.overview import make_overview
    from caltech_hpo.results.page import write_pages

    folder = output or place.home / "reports"
    if output is None and not place.home.is_dir():
        raise UsageError(f"{place.home}: there is no such home", "give --home, or --output DIR for the page")
    with goes_on(kept=False), progress_bars() as bars:
        made = make_overview(place)
        try:
            pages = write_pages(made, folder, bars)
        except OSError as error:
            raise StorageError(
                f"{error.filename or folder}: {error.strerror}",
                "give a folder that can be written: --output DIR",
            ) from error
    summaries = [study.summary for study in made.studies]
    document = {
        "summary": [summary.model_dump(mode="json") for summary in summaries],
        "not_shown": made.unread, "markdown": str(pages.markdown), "html": str(pages.html),
    }  # fmt: skip
    lines = [f"Markdown: {pages.markdown}", f"HTML: {pages.html}"]
    answer(document, as_json, Group(summary_table(summaries), *(escape(line) for line in lines)))
    for name, why in made.unread.items():
        say(f"not shown: {name}: {why}")


def summary_table(summaries: list[StudySummary]) -> RenderableType:
    """The studies in short; the page has the whole table."""
    columns = (
        "study",
        "published val",
        "test",
        "ours of it",
        "our best",
        "confirmed",
        "final test",
        "test used",
        "finished",
    )
    return table_of(columns, [_cells(one) for one in summaries], left=("study",), title="all studies")


def _cells(one: StudySummary) -> list[str]:
    published = one.published
    return [
        one.study,
        percent(published.validation) if published else "-",
        percent(published.test) if published else "-",
        percent(one.ours_validation)
        if one.ours_validation is not None
        else one.ours_state
        if one.row
        else "-",
        "not run" if not one.in_database else percent(one.best_validation),
        percent(one.confirmed.mean) + over(one.confirmed.seeds) if one.confirmed else "not run",
        percent(one.test.top1) + over(one.test.seeds) + one.test.leak_words if one.test else "not run",
        f"{one.test_uses} x",
        str(one.complete + one.pruned),
    ]
