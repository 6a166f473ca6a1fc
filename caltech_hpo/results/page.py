"""The page of all studies: report.md with its pictures beside it, and report.html in one file."""

from __future__ import annotations

import base64
import dataclasses
import re
from datetime import datetime
from pathlib import Path
from urllib.parse import quote

import jinja2
from markupsafe import Markup

from caltech_hpo import __version__
from caltech_hpo.data.cache import Progress
from caltech_hpo.results.charts import Chart, draw_charts
from caltech_hpo.results.model_files import write_text
from caltech_hpo.results.overview import Overview, StudyOverview
from caltech_hpo.results.page_text import NOTES, Table, facts, row_table, summary_table
from caltech_hpo.results.plots import draw_study_curves
from caltech_hpo.study_files import base_name

TEMPLATES = Path(__file__).parent / "templates"


@dataclasses.dataclass(frozen=True)
class Pages:
    """The two files."""

    markdown: Path
    html: Path


@dataclasses.dataclass(frozen=True)
class Section:
    """A study's part of the page. `again` says that it is a NAME@K, which stands under its base."""

    name: str
    about: str
    again: bool
    facts: list[tuple[str, str]]
    table: Table
    curves: Path | None
    charts: list[Chart]


def write_pages(made: Overview, folder: Path, progress: Progress | None = None) -> Pages:
    """Draws the pictures into `folder`/STUDY and writes both files, over earlier ones."""
    folder.mkdir(parents=True, exist_ok=True)
    sections = []
    for number, study in enumerate(made.studies):
        if progress:
            progress("report", number, len(made.studies))
        sections.append(_section(study, folder / study.name))
    if progress:
        progress("report", len(made.studies), len(made.studies))
    values = {
        "summary": summary_table([study.summary for study in made.studies]),
        "sections": sections, "notes": NOTES, "unread": made.unread, "version": __version__,
        "written": f"{datetime.now():%Y-%m-%d %H:%M}",
    }  # fmt: skip
    pages = Pages(folder / "report.md", folder / "report.html")
    write_text(pages.markdown, environment(folder, html=False).get_template("report.md.j2").render(values))
    write_text(pages.html, environment(folder, html=True).get_template("report.html.j2").render(values))
    return pages


def _section(study: StudyOverview, folder: Path) -> Section:
    drawn = any(record.epochs for record in study.records)
    title = f"study {study.name}"
    important = study.importance is not None and study.importance.shares is not None
    return Section(
        name=study.name,
        about=" ".join(study.spec.about.partition("\n\n")[0].split()),
        again=study.name != base_name(study.name),
        facts=facts(study),
        table=row_table(study),
        curves=draw_study_curves(study.records, title, folder / "curves.png") if drawn else None,
        charts=draw_charts(study.spec, study.records, folder, important=important) if drawn else [],
    )


def environment(folder: Path, *, html: bool) -> jinja2.Environment:
    """Jinja with the templates and what they use; links in them are relative to `folder`."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=html, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    made.filters.update(
        md=markdown_text, link=lambda path: quote(path.relative_to(folder).as_posix()), data_uri=data_uri,
        safe_json=Markup, anchor=anchor,
    )  # fmt: skip
    made.globals["plotly_js"] = _plotly_js
    return made


def _plotly_js() -> Markup:
    from plotly.offline import get_plotlyjs

    return Markup(get_plotlyjs())  # the library's own text


def markdown_text(text: str) -> str:
    """The text as it is in Markdown, also inside a table: no mark, tag or line break of it has a meaning."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]|#!~])", r"\\\1", text)


def anchor(name: str) -> str:
    """A study's name as a fragment identifier."""
    return "study-" + re.sub(r"[^A-Za-z0-9_-]", "-", name)


def data_uri(path: Path) -> str:
    """A PNG file as a URI that holds it."""
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
