"""What the dashboard tells: notes, pictures and plots are what the database holds."""

from __future__ import annotations

import io
import json
import shutil

import pytest
from asking import app_of, call
from made_studies import searched
from PIL import Image

from caltech_hpo.results.ledger import FinalResult, old_row, record
from caltech_hpo.results.story import study_note, trial_note
from caltech_hpo.results.story_plots import accuracy_over_time, against_published, best_curves, story_plots
from caltech_hpo.search.storage import find_study, open_storage
from caltech_hpo.search.urls import default_url

PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    home = tmp_path_factory.mktemp("story")
    spec, records = searched(
        home,
        lambda trial, epoch: 0.05 * trial + 0.01 * epoch,
        name="alexnet-scratch",
        trials=7,
        diverging={4},
    )
    made = type("Made", (), {"home": home, "spec": spec, "records": records, "url": default_url(home)})
    study = find_study(open_storage(made.url), "alexnet-scratch")
    made.study = study._study_id
    return made


def detail(made, **query):
    reply = call(app_of(made), path=f"/api/studies/{made.study}", QUERY_STRING="&".join(query))
    assert reply.status == 200 and reply.header["content-length"] == str(len(reply.body))
    return json.loads(reply.body)


def test_every_trial_has_its_note_and_its_curves(made):
    document = detail(made)
    assert [trial["number"] for trial in document["trials"]] == list(range(7))
    app = app_of(made)
    for trial, record_ in zip(document["trials"], made.records, strict=True):
        body = trial["note"]["body"]
        assert body == trial_note(record_, made.spec) and f"**{record_.state}**" in body
        assert ("Hand-tuned row" in body) == bool(record_.baseline)
        (artifact,) = trial["artifacts"]
        assert artifact["filename"] == f"trial-{record_.number}-curves.png"
        path = f"/artifacts/{made.study}/{trial['trial_id']}/{artifact['artifact_id']}"
        reply = call(app, path=path)
        assert reply.status == 200 and reply.body.startswith(PNG)
        assert reply.header["content-security-policy"].startswith("sandbox")
        assert Image.open(io.BytesIO(reply.body)).size[0] > 800
    diverged = document["trials"][4]["note"]["body"]
    assert "**pruned**: diverged" in diverged
    assert "published: final loss 0.02, validation 0.55, test 0.54" in document["trials"][0]["note"]["body"]
    other = f"/artifacts/{made.study}/{document['trials'][1]['trial_id']}/{artifact['artifact_id']}"
    assert call(app, path=other).status == 404
    assert document["objective_names"] == ["validation top-1 accuracy"]


def test_the_study_says_where_it_stands_and_how_to_go_on(made):
    document = detail(made)
    body = document["note"]["body"]
    best = max((r for r in made.records if r.state == "complete"), key=lambda r: r.value)
    assert f"trial {best.number}, validation top-1 **{best.value:.4f}**" in body
    assert "    caltech-hpo search --study alexnet-scratch --trials 27" in body
    assert "| learning\\_rate" in body or "| learning_rate |" in body
    plots = {plot["id"]: json.loads(plot["graph_object"]) for plot in document["plotly_graph_objects"]}
    assert set(plots) == {"best-curves", "accuracy-over-time", "ours-against-published"}
    assert len(plots["best-curves"]["data"]) == 7


def test_a_users_note_is_shown_in_place_of_ours(made, tmp_path):
    copy = type("Made", (), {**vars(made), "home": shutil.copytree(made.home, tmp_path / "home")})
    body = json.dumps({"version": 1, "body": "mine"}).encode()
    trial = detail(copy)["trials"][2]
    app = app_of(copy, writable=True)
    for path in (f"/api/studies/{made.study}/note", f"/api/studies/{made.study}/{trial['trial_id']}/note"):
        assert call(app, "PUT", path, body).status == 204
    document = detail(copy)
    assert document["note"]["body"] == document["trials"][2]["note"]["body"] == "mine"
    assert document["trials"][1]["note"]["body"].startswith("**Hand-tuned row")


def test_the_final_scores_pictures_are_the_studys(made, tmp_path):
    home = shutil.copytree(made.home, tmp_path / "home")
    copy = type("Made", (), {**vars(made), "home": home})
    folder = home / "models" / "final"
    folder.mkdir(parents=True)
    Image.new("RGB", (3, 2)).save(folder / "confusion.png")
    first = made.records[0]
    result = FinalResult(
        study="alexnet-scratch", trial=0, params={}, best_epoch=1, val_accuracy=0.5, test_accuracy=0.526,
        test_mean_per_class_accuracy=0.4, test_images=100, ci95=(0.4, 0.6), fit_on="train",
        model=str(folder / "model.safetensors"), recipe_hash=first.recipe.hash,
    )  # fmt: skip
    record(default_url(home), old_row("alexnet-scratch", result, first))
    document = detail(copy)
    assert "top-1 **0.5260**" in document["note"]["body"] and "used 1 time " in document["note"]["body"]
    (artifact,) = document["artifacts"]
    assert artifact["filename"] == "final-trial-0-seed-0-confusion-matrix.png"
    reply = call(app_of(copy), path=f"/artifacts/{made.study}/{artifact['artifact_id']}")
    assert reply.body == (folder / "confusion.png").read_bytes()


def test_other_programs_studies_and_unknown_ones_are_left_alone(made, tmp_path):
    import optuna

    copy = type("Made", (), {**vars(made), "home": shutil.copytree(made.home, tmp_path / "home")})
    foreign = optuna.create_study(study_name="foreign", storage=open_storage(default_url(copy.home)))
    foreign.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
    reply = call(app_of(copy), path=f"/api/studies/{foreign._study_id}")
    document = json.loads(reply.body)
    assert reply.status == 200 and document["note"]["body"] == "" == document["trials"][0]["note"]["body"]
    assert document["plotly_graph_objects"] == []
    assert call(app_of(copy), path="/api/studies/99").status == 404


def test_plots_hold_the_records(made):
    curves = best_curves(made.records)
    best = max(made.records, key=lambda r: r.value)
    assert curves.data[0].name.startswith(f"trial {best.number}:")
    assert list(curves.data[0].y) == [epoch.validation_top1 for epoch in best.epochs]
    times = accuracy_over_time(made.records)
    assert times.data[-1].x[-1] == pytest.approx(sum(r.seconds for r in made.records) / 3600)
    ours = against_published(made.spec, made.records)
    assert set(ours.data[0].x) <= {0.47, 0.12, 0.55, 0.34, 0.16} and len(ours.data[0].x) == 5
    assert story_plots(made.spec, []) == {}
    assert "none yet" in study_note("x", made.spec, [])
