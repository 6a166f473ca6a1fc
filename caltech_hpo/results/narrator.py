"""Adds notes, pictures and plots to what optuna-dashboard serves: WSGI middleware around it.

They are made from the database when somebody looks, and not written into it: a note kept in Optuna's tables
would have to be kept up to date by whoever writes trials, and optuna-dashboard reads all notes of a study
again for each of its trials. A note that a user wrote is shown in place of ours.
"""

from __future__ import annotations

import json
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from caltech_hpo.results import ledger
from caltech_hpo.results.evidence import by_configuration, confirmation, of_trials
from caltech_hpo.results.ledger import ScoreRow
from caltech_hpo.results.model_files import kept_folder
from caltech_hpo.results.plots import png, training_curves
from caltech_hpo.results.story import study_note, trial_note
from caltech_hpo.results.story_plots import story_plots
from caltech_hpo.search.changes import SPEC_ATTR, study_spec
from caltech_hpo.search.records import TrialRecord, trial_record
from caltech_hpo.search.request import Place

if TYPE_CHECKING:
    import optuna
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial

    from caltech_hpo.spec import StudySpec

STUDY = re.compile(r"/api/studies/([0-9]+)/?")
TRIAL_PICTURE = re.compile(r"/artifacts/([0-9]+)/([0-9]+)/([0-9a-f-]{36})/?")
STUDY_PICTURE = re.compile(r"/artifacts/([0-9]+)/([0-9a-f-]{36})/?")
OURS = uuid.UUID("6d4bd7b8-5d0e-4a0c-9f0a-1b6f1c2a7e11")  # the namespace of our artifacts' ids
FINAL_PICTURES = {"confusion.png": "confusion matrix", "curves.png": "curves"}
MOST_DRAWN = 200  # pictures kept in memory, 60 KB each
PLOT_SHARE = 20.0  # plots are drawn anew after so many times what drawing them took
Documents = dict[str, Any]


def narrated(app: WSGIApplication, storage: BaseStorage, place: Place) -> WSGIApplication:
    """The dashboard with our notes, pictures and plots in its replies."""
    narrator = Narrator(storage, place)

    def application(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "")
        if environ["REQUEST_METHOD"] in ("GET", "HEAD"):
            if found := STUDY.fullmatch(path):
                return _rewritten(app, environ, start_response, narrator, int(found[1]))
            picture = narrator.picture(path)
            if picture is not None:
                start_response(
                    "200 OK", [("Content-Type", "image/png"), ("Content-Length", str(len(picture)))]
                )
                return [picture]
        return app(environ, start_response)

    return application


def _rewritten(
    app: WSGIApplication, environ: WSGIEnvironment, start_response: StartResponse, narrator: Narrator,
    study_id: int,
) -> Iterable[bytes]:  # fmt: skip
    """The reply to a question for a study, with the story of the trials that are in it."""
    said: list[Any] = []

    def start(
        status: str, headers: list[tuple[str, str]], exc_info: Any = None, /
    ) -> Callable[[bytes], object]:
        said[:] = [status, headers, exc_info]
        return lambda _: None

    reply = app(environ, start)
    try:
        body = b"".join(reply)
    finally:
        if hasattr(reply, "close"):
            reply.close()
    status, headers, exc_info = said
    if status.startswith("200") and body:
        document = json.loads(body)
        narrator.tell(study_id, document)
        body = json.dumps(document).encode()
        headers = [(name, value) for name, value in headers if name.lower() != "content-length"]
        headers.append(("Content-Length", str(len(body))))
    start_response(status, headers, exc_info)
    return [body]


class _Plotted(NamedTuple):
    plots: list[Documents]
    until: float  # monotonic seconds


class Narrator:
    """Makes the notes, pictures and plots of all studies; finished trials are read once."""

    def __init__(self, storage: BaseStorage, place: Place) -> None:
        self._storage, self._place = storage, place
        self._finished: dict[tuple[int, datetime | None], TrialRecord] = {}
        self._lock = threading.Lock()  # the server has threads
        self._drawn: dict[str, bytes] = {}
        self._plotted: dict[str, _Plotted] = {}

    def tell(self, study_id: int, document: Documents) -> None:
        """Adds to optuna-dashboard's description of a study. Studies that are not ours stay as they are."""
        import optuna

        study = optuna.load_study(study_name=document["name"], storage=self._storage)
        if SPEC_ATTR not in study.user_attrs:
            return
        spec, records = study_spec(study), self._records(study_id)
        for trial in (*document["trials"], *document["best_trials"]):
            record = records.get(trial["trial_id"])
            if record is not None:
                self._tell_trial(trial, record, spec)
        self._tell_study(study, document, spec, list(records.values()))

    def _tell_trial(self, trial: Documents, record: TrialRecord, spec: StudySpec) -> None:
        if not trial["note"]["body"]:
            trial["note"] = {"version": trial["note"]["version"], "body": trial_note(record, spec)}
        if record.epochs:
            key = _curves_id(trial["study_id"], trial["trial_id"], record)
            trial["artifacts"].append(_artifact(key, f"trial-{record.number}-curves.png"))

    def _tell_study(
        self, study: optuna.Study, document: Documents, spec: StudySpec, records: list[TrialRecord]
    ) -> None:
        name = study.study_name
        rows = of_trials(ledger.scores(self._place.storage, name), records)
        if not document["note"]["body"]:
            made = study_note(
                name, spec, records, confirmed=confirmation(study, records, self._place),
                scores=by_configuration(rows), uses=len(ledger.family_scores(self._place.storage, name)),
            )  # fmt: skip
            document["note"] = {"version": document["note"]["version"], "body": made}
        for row in rows:
            for file, what in FINAL_PICTURES.items():
                if self._final_file(row, file):
                    shown = f"final-trial-{row.trial}-seed-{row.seed}-{what.replace(' ', '-')}.png"
                    document["artifacts"].append(_artifact(_final_id(row, file), shown))
        document["plotly_graph_objects"] += self._plots(name, spec, records)

    def _plots(self, name: str, spec: StudySpec, records: list[TrialRecord]) -> list[Documents]:
        """The study's plots. A page asks every few seconds: what took long to draw is shown for a while."""
        with self._lock:
            kept = self._plotted.get(name)
            if kept is not None and time.monotonic() < kept.until:
                return kept.plots
            begin = time.monotonic()
            plots = [
                {"id": key, "graph_object": figure.to_json()}
                for key, figure in story_plots(spec, records).items()
            ]
            now = time.monotonic()
            self._plotted[name] = _Plotted(plots, now + PLOT_SHARE * (now - begin))
            return plots

    def picture(self, path: str) -> bytes | None:
        """The PNG that one of our artifact addresses means; None for other addresses."""
        if found := TRIAL_PICTURE.fullmatch(path):
            study_id, trial_id = int(found[1]), int(found[2])
            record = self._records(study_id).get(trial_id)
            if record is not None and found[3] == _curves_id(study_id, trial_id, record):
                return self._curves(found[3], record)
        elif found := STUDY_PICTURE.fullmatch(path):
            return self._final_picture(int(found[1]), found[2])
        return None

    def _curves(self, key: str, record: TrialRecord) -> bytes:
        with self._lock:
            if key not in self._drawn:
                if len(self._drawn) >= MOST_DRAWN:
                    self._drawn.clear()
                self._drawn[key] = png(training_curves(record.epochs, f"trial {record.number}"))
            return self._drawn[key]

    def _final_picture(self, study_id: int, key: str) -> bytes | None:
        try:
            name = self._storage.get_study_name_from_id(study_id)
        except KeyError:
            return None
        for row in ledger.scores(self._place.storage, name):
            for file in FINAL_PICTURES:
                path = self._final_file(row, file)
                if key == _final_id(row, file) and path is not None:
                    return path.read_bytes()
        return None

    def _final_file(self, row: ScoreRow, file: str) -> Path | None:
        folder = kept_folder(row.model_file, self._place.models)
        return folder / file if folder is not None and (folder / file).is_file() else None

    def _records(self, study_id: int) -> dict[int, TrialRecord]:
        """All trials by their ids, in the order of their numbers; empty for an unknown study."""
        try:
            trials = self._storage.get_all_trials(study_id, deepcopy=False)
        except KeyError:
            return {}
        with self._lock:
            return {trial._trial_id: self._record(trial) for trial in trials}

    def _record(self, trial: FrozenTrial) -> TrialRecord:
        key = trial._trial_id, trial.datetime_complete  # databases give the ids of deleted trials again
        known = self._finished.get(key)
        if known is not None:
            return known
        made = trial_record(trial)
        if trial.state.is_finished():
            self._finished[key] = made
        return made


def _artifact(key: str, filename: str) -> Documents:
    return {"artifact_id": key, "filename": filename, "mimetype": "image/png", "encoding": None}


def _curves_id(study_id: int, trial_id: int, record: TrialRecord) -> str:
    """Another id with every epoch: browsers keep what they have seen."""
    return str(uuid.uuid5(OURS, f"{study_id}/{trial_id}/curves/{len(record.epochs)}/{record.state}"))


def _final_id(row: ScoreRow, file: str) -> str:
    return str(uuid.uuid5(OURS, f"{row.study}/{row.recipe_hash}/{row.taken_at}/{file}"))
