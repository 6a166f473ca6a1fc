"""The answers of `bench` for people."""

from __future__ import annotations

import platform
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType

from caltech_hpo.cli.display import duration
from caltech_hpo.cli.tables import table_of

if TYPE_CHECKING:
    from caltech_hpo.search.bench import Speed
    from caltech_hpo.search.bench_study import Measurements
    from caltech_hpo.search.overhead import Overhead
    from caltech_hpo.search.reporters import ReportsHeld

NOT_RUN = "not run"
KEYS = ("model", "phase", "stock", "ours", "floor", "over_stock", "of_floor", "data_wait_s")


def speed_table(found: Measurements, machine: str) -> Group:
    """Images a second side by side."""
    rows, studies, cache = found.speeds, found.studies, found.cache
    cells = [
        [row.model, row.phase, *map(_rate, (row.stock, row.ours, row.floor)), _ratio(row.over_stock),
         _ratio(row.of_floor), "-" if row.data_wait_s is None else f"{row.data_wait_s:.2f} s",
         str(row.batch_size)]
        for row in rows
    ]  # fmt: skip
    columns = (
        "model", "phase", "stock", "ours", "floor", "ours / stock", "ours / floor", "data wait", "batch",
    )  # fmt: skip
    parts: list[RenderableType] = [table_of(columns, cells, left=("model", "phase"))]
    if studies:
        lines = [
            [row.study, str(row.workers), str(row.trials), str(row.epochs), duration(row.seconds),
             f"{row.epochs / row.seconds:.2f}"]
            for row in studies
        ]  # fmt: skip
        names = ("study", "workers", "trials", "epochs", "time", "epochs / s")
        parts.append(table_of(names, lines, left=("study",)))
    measured = f"median of {rows[0].rounds} on {rows[0].device}"
    parts.append(f"images per second, {measured}; {machine}; data wait: of an epoch")
    if cache is not None:
        parts.append(
            f"decoding: {cache.per_core:,.0f} images per second and core ({cache.images:,} images on "
            f"{cache.cores} cores); opening what is decoded: {cache.open_seconds:.2f} s"
        )
    return Group(*parts)


def speed_line(row: Speed) -> str:
    """A row as soon as it is measured."""
    return (
        f"{row.model} {row.phase}, images/s: {_rate(row.ours)}, stock {_rate(row.stock)} "
        f"(ours / stock {_ratio(row.over_stock)}), floor {_rate(row.floor)} ({_ratio(row.of_floor)})"
    )


def _rate(images: float | None) -> str:
    return NOT_RUN if images is None else f"{images:,.1f}"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def overhead_table(measured: Overhead) -> Group:
    """What a trial costs beside its training."""
    rows = [
        ["ours", f"{measured.ours_ms:.1f} ms"],
        ["Optuna's own storage", f"{measured.optuna_ms:.1f} ms"],
    ]
    table = table_of(("searching alone", "a trial"), rows, left=("searching alone",))
    note = (
        f"ask, {measured.epochs} reports, tell on SQLite: means of the last {measured.measured} of "
        f"{measured.trials} made-up trials, which took {duration(measured.seconds)}"
    )
    return Group(table, note)


def reports_table(measured: ReportsHeld) -> Group:
    """What one supervisor holds, and where its time goes."""
    rest = max(0.0, 1 - measured.sampling - measured.writing - measured.idle)
    rows = [
        ["offered", f"{measured.offered:,.0f} / s"],
        ["held", f"{measured.held:,.0f} / s"],
        ["the last report waited", f"{measured.late:.2f} s"],
        ["time: drawing parameters", f"{measured.sampling:.0%}"],
        ["time: writing", f"{measured.writing:.0%}"],
        ["time: pruning and the rest", f"{rest:.0%}"],
        ["time: waiting for reports", f"{measured.idle:.0%}"],
    ]
    table = table_of(("reports", ""), rows, left=("reports",))
    note = (
        f"{measured.workers:,} simulated workers, each a report a second, for {duration(measured.seconds)}; "
        f"{measured.database}, {measured.sampler} sampler, {measured.trials:,} trials begun"
    )
    return Group(table, note)


def rows_json(found: Measurements) -> list[dict[str, Any]]:
    """One list of rows; `phase` says of what: train, eval, epoch, study or cache.

    All have the KEYS, None where one means nothing.
    """
    rows = [{**asdict(row), "over_stock": row.over_stock, "of_floor": row.of_floor} for row in found.speeds]
    rows += [{"phase": "study", **asdict(row)} for row in found.studies]
    if found.cache is not None:
        rows.append({"phase": "cache", **asdict(found.cache), "per_core": found.cache.per_core})
    return [dict.fromkeys(KEYS) | row for row in rows]


def machine() -> str:
    """Processor cores and the versions that matter."""
    from importlib.metadata import version

    from caltech_hpo.data.decode import usable_cores

    python, torch = platform.python_version(), version("torch")
    return f"{usable_cores()} CPU cores ({platform.machine()}), Python {python}, torch {torch}"
