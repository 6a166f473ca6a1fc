"""The page of all studies: what it says, that it needs nothing else, and that no text of a user breaks it."""

from __future__ import annotations

import base64
import json
import re
import shutil
from html.parser import HTMLParser

import optuna
import pytest
from made_studies import searched
from PIL import Image

from caltech_hpo.cli.overview import check_choice
from caltech_hpo.errors import UsageError
from caltech_hpo.results.charts import draw_charts
from caltech_hpo.results.evidence import Confirmed, by_configuration
from caltech_hpo.results.ledger import FINAL_ATTR, FinalResult, old_row, record
from caltech_hpo.results.overview import make_overview, page_order, reference_row
from caltech_hpo.results.page import markdown_text, write_pages
from caltech_hpo.results.page_text import confirmed_text
from caltech_hpo.search.records import trial_records
from caltech_hpo.search.request import Place
from caltech_hpo.search.storage import open_storage
from caltech_hpo.search.urls import default_url
from caltech_hpo.spec import Choices, Hyperparameters
from caltech_hpo.study_files import load_study, study_files

EVIL = "<script>alert('x')</script> | *row* [a](http://evil.example/) & `b`"
MINE = f"""# Mine: a study <b>for</b> the test.

data = "folder"

[recipe]
architecture = "resnet18"
epochs = 3
step_size = 2

[space]
learning_rate = {{ low = 0.001, high = 0.1, log = true }}
batch_size = {{ choices = [32, 64] }}

[pruner]
warmup_epochs = 1
startup_trials = 1

[[baselines]]
name = {json.dumps(EVIL)}
params = {{ learning_rate = 0.05, batch_size = 64 }}
published = {{ final_loss = 0.02, validation = 0.55, test = 0.54 }}

[[baselines]]
name = "second"
params = {{ learning_rate = 0.002, batch_size = 64 }}
published = {{ outcome = "diverges" }}
"""


def rising(trial, epoch):
    return [0.5, 0.6, 0.1, 0.7][trial % 4] + 0.01 * epoch


def final(trial, accuracy, **changes):
    return FinalResult(
        study="mine", trial=trial, params={}, best_epoch=1, val_accuracy=0.5, test_accuracy=accuracy,
        test_mean_per_class_accuracy=0.4, test_images=100, ci95=(accuracy - 0.1, accuracy + 0.1),
        fit_on="train", model="m", recipe_hash=f"{trial}-{accuracy}",
    ).model_copy(update=changes)  # fmt: skip


def place_in(home):
    return Place(home, default_url(home))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Searches of "mine" (scored on the test set twice) and "mine@2"; a foreign study, a faulty file."""
    home = tmp_path_factory.mktemp("home")
    (home / "studies").mkdir()
    (home / "studies" / "mine.toml").write_text(MINE)
    (home / "studies" / "broken.toml").write_text("data = 3\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        searched(home, rising, name="mine", trials=5)
        searched(home, rising, name="mine@2", trials=2)
    storage = open_storage(default_url(home))
    study = optuna.load_study(study_name="mine", storage=storage)
    recipes = {record.number: record.recipe for record in trial_records(study)}
    for result in (final(0, 0.51), final(3, 0.62)):
        result = result.model_copy(update={"recipe_hash": recipes[result.trial].hash})
        study.set_user_attr(f"{FINAL_ATTR}{result.recipe_hash}", result.model_dump(mode="json"))
    foreign = optuna.create_study(study_name="<i>foreign</i>", storage=storage)
    foreign.tell(foreign.ask(), 1.0)
    return home


@pytest.fixture
def here(home, monkeypatch):
    monkeypatch.chdir(home)
    return home


@pytest.fixture
def pages(here, tmp_path):
    return write_pages(make_overview(place_in(here)), tmp_path / "out [1]")


def test_each_study_stands_in_its_place():
    declared = ["a", "b", "demo"]
    assert page_order(declared, []) == declared
    stored = ["a", "demo@10", "demo@2", "gone", "gone@2", "b@x", "demo"]
    found = page_order(declared, stored)
    assert found == ["a", "b", "b@x", "demo", "demo@2", "demo@10", "gone", "gone@2"]
    assert page_order(["a", "b"], ["b@2"]) == ["b", "b@2", "a"]  # what has run comes first
    assert page_order(["a", "x@2"], []) == ["a", "x@2"]


@pytest.mark.parametrize(
    ("study", "row"),
    [
        ("alexnet-scratch", "LR 0.05, 50 epochs, step 35"),
        ("alexnet-augment", "centre crop"),
        ("alexnet-freeze", "train all"),
        ("resnet18-transfer", "LR 0.02, 30 epochs, step 20"),
        ("vgg16-transfer", "as AlexNet's best row: LR 0.01, 20 epochs, step 15"),
        ("demo", "by hand: LR 0.05, 6 epochs, step 4"),
        ("resnet18-scratch", "resized crop, flip, smoothing, mixing; 100 epochs"),
        ("lite0-head", None),
    ],
)
def test_the_row_to_compare_with_is_the_best_published_one(study, row):
    found = reference_row(load_study(study))
    assert (found.name if found else None) == row


def test_a_study_on_one_line(here):
    made = make_overview(place_in(here))
    by_name = {study.name: study for study in made.studies}
    names = list(by_name)
    assert names[names.index("mine") + 1] == "mine@2" and names.index("mine") < names.index("demo")
    one = by_name["mine"].summary
    assert (one.row, one.published.validation, one.published.test) == (EVIL, 0.55, 0.54)
    assert (one.ours_trial, one.ours_state, one.ours_test) == (0, "complete", 0.51)
    assert one.ours_validation == pytest.approx(0.53)
    assert (one.best_trial, one.test.trial, one.test.top1, one.test_uses) == (3, 3, 0.62, 2)
    assert one.best_validation == pytest.approx(0.73)
    assert (one.complete, one.pruned, one.failed, one.seeds) == (3, 2, 0, 1)
    assert one.devices == ("cpu",) and one.training_hours == pytest.approx(11 * 2.0 / 3600)
    assert (by_name["mine"].importance.complete, by_name["mine"].importance.pruned) == (3, 2)
    again = by_name["mine@2"].summary
    assert (again.best_trial, again.test, again.test_uses) == (1, None, 2)  # those of "mine"
    assert set(made.unread) == {"<i>foreign</i>", "broken"}


def test_a_study_that_never_ran_has_no_figures_of_ours(here):
    one = next(s for s in make_overview(place_in(here)).studies if s.name == "alexnet-scratch")
    assert not one.summary.in_database and one.summary.ours_state == "not run"
    ours = one.summary.model_dump(exclude={"study", "row", "published", "ours_state"})
    assert not any(ours.values())
    assert [row.state for row in one.rows] == ["not run"] * 6


def test_an_empty_home_stays_empty(tmp_path):
    made = make_overview(place_in(tmp_path))
    assert len(made.studies) == len(study_files()) and not list(tmp_path.iterdir())


def test_scores_over_seeds_are_one_mean_with_an_interval():
    results = [final(1, 0.5), final(2, 0.6), final(1, 0.52), final(1, 0.4, fit_on="train+val")]
    rows = [
        old_row("mine", one, None).model_copy(update={"configuration": f"{one.trial}, {one.fit_on}"})
        for one in results
    ]
    found = by_configuration(rows)
    assert [(s.trial, s.fit_on, s.seeds) for s in found] == [
        (1, "train", 2),
        (2, "train", 1),
        (1, "train+val", 1),
    ]
    assert found[0].top1 == pytest.approx(0.51)
    assert found[0].high - found[0].top1 == pytest.approx(
        12.706 * 0.01, rel=1e-3
    )  # t(1) at 97.5%, sd / sqrt(2)
    assert (found[1].low, found[1].high) == pytest.approx((0.5, 0.7))


@pytest.mark.parametrize(
    ("confirmed", "text"),
    [
        (None, "not run"),
        (
            Confirmed(trial=4, configuration="c", seeds=3, mean=0.5, low=0.45, high=0.55),
            "0.500 (0.450 to 0.550), 3 seeds, trial 4",
        ),
        (
            Confirmed(trial=4, configuration="c", seeds=1, mean=0.5, low=None, high=None),
            "0.500, 1 seed, trial 4",
        ),
    ],
)
def test_a_confirmation_with_what_it_rests_on(confirmed, text):
    assert confirmed_text(confirmed) == text


CELL = re.compile(r"(?<!\\)\|")


def tables(text):
    """Every table of a Markdown text as a list of {column: text}."""
    found, block = [], []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            block.append([cell.strip() for cell in CELL.split(line)[1:-1]])
        elif block:
            assert {len(row) for row in block} == {len(block[0])}  # no text of a cell makes another one
            found.append([dict(zip(block[0], row, strict=True)) for row in block[2:]])
            block = []
    return found


def test_the_markdown_has_published_and_our_figures_side_by_side(pages):
    text = pages.markdown.read_text()
    summary, *sections = tables(text)
    rows = {row["study"]: row for row in summary}
    mine = rows["mine"]
    assert (mine["published validation"], mine["published test"]) == ("0.550", "0.540")
    assert mine["ours of that row: validation"] == "0.530 (complete, trial 0)"
    assert mine["ours of that row: test"] == "0.510, 1 seed"
    assert mine["our best: validation"] == "0.730 (trial 3, 1 seed)" and mine["confirmed"] == "not run"
    assert mine["final test (95% interval)"] == "0.620 (0.520 to 0.720), 1 seed, trial 3"
    assert mine["test set used"] == "2 x" and mine["complete / pruned / failed"] == "3 / 2 / 0"
    scratch = rows["alexnet-scratch"]
    assert (scratch["published validation"], scratch["published test"]) == ("0.550", "0.540")
    ours = [
        text for name, text in scratch.items() if name.startswith(("our", "final", "confirmed", "training"))
    ]
    assert ours == ["not run"] * 6
    table = next(table for table in sections if table[0].get("hand-tuned row") == markdown_text(EVIL))
    assert [row["trial"] for row in table[:3]] == ["0", "1", "3 (best)"]
    assert (table[0]["validation"], table[0]["published validation"]) == ("0.530", "0.550")
    assert table[1]["published loss"] == "diverges" and table[-1]["outcome"] == "lagging"
    assert "torch 0" in text and "1 seed" in text and "broken" in text
    assert text.index("\n## mine\n") < text.index("\n### mine@2\n")


def test_the_markdowns_pictures_are_beside_it(pages):
    text = pages.markdown.read_text()
    links = re.findall(r"!\[[^\]]*\]\(([^)]*)\)", text)
    assert len(links) == 8 and not any(":" in link or link.startswith("/") for link in links)
    for link in links:
        with Image.open(pages.markdown.parent / link.replace("%40", "@")) as image:
            assert image.format == "PNG" and min(image.size) > 300
    assert "<script" not in text and not re.search(r"(?<!\\)\]\(http", text)
    assert not list(pages.markdown.parent.rglob("*.tmp"))


class Page(HTMLParser):
    """Elements with their attributes, the text of scripts and styles, and the visible text."""

    EMPTY = ("meta", "img")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.scripts, self.styles, self.words = [], [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        inside = self.open[-1] if self.open else ""
        {"script": self.scripts, "style": self.styles}.get(inside, self.words).append(data)


def test_the_html_is_whole_escaped_and_needs_no_network(pages):
    page = Page(pages.html.read_text())
    assert page.open == []
    assert EVIL in page.words and "mine@2" in page.words and "<i>foreign</i>" in "".join(page.words)
    assert not {tag for tag, _ in page.tags} & {"link", "iframe", "object", "base", "form", "i", "b"}
    for tag, attrs in page.tags:
        assert not [name for name in attrs if name.startswith("on")]
        for name in ("src", "href", "srcset", "action", "data"):
            if name in attrs:
                assert attrs[name].startswith(("data:image/png;base64,", "#study-")), (tag, attrs[name][:80])
    (policy,) = [a["content"] for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none';") and "http" not in policy
    assert not re.search(r"url\(|@import|http", "".join(page.styles))
    figures = [script for script in page.scripts if script.startswith("{")]
    others = [script for script in page.scripts if not script.startswith("{") and script.strip()]
    assert len(figures) == 6 and all({"data", "layout"} <= set(json.loads(text)) for text in figures)
    assert len(others) == 2 and len(others[0]) > 1_000_000 and "http" not in others[1]  # plotly, once; ours
    assert "0.550" in page.words and "0.530 (complete, trial 0)" in page.words and "not run" in page.words


def test_the_htmls_pictures_are_inside(pages):
    page = Page(pages.html.read_text())
    images = [attrs["src"] for tag, attrs in page.tags if tag == "img"]
    assert len(images) == 2
    for image in images:
        assert base64.b64decode(image.partition(",")[2]).startswith(b"\x89PNG")
    targets = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
    links = [attrs["href"][1:] for tag, attrs in page.tags if tag == "a"]
    assert len(links) == len(targets) and set(links) == targets


def test_writing_the_page_again_gives_the_same_page(here, tmp_path):
    def written():
        text = write_pages(made, tmp_path).markdown.read_text()
        return re.sub(r"Written .* by", "", text), sorted(path.name for path in tmp_path.rglob("*"))

    made = make_overview(place_in(here))
    assert written() == written()


def test_no_choice_of_a_space_ends_the_script_element(tmp_path):
    name = "</script><script>alert(1)</script>"
    spec = load_study("demo")
    spec = spec.model_copy(
        update={
            "space": {"augmentation": Choices(choices=(name, "b"))},
            "recipe": Hyperparameters(architecture="resnet18"),
        }
    )
    _, records = searched(tmp_path, rising, trials=3, baselines=())
    records = [
        record.model_copy(update={"params": {"augmentation": name if record.number else "b"}})
        for record in records
    ]
    charts = draw_charts(spec, records, tmp_path, important=True)
    assert [chart.kind for chart in charts] == ["history", "parallel", "importance"]
    assert not any("<" in chart.figure for chart in charts)
    assert name in str(json.loads(charts[1].figure))


def test_the_best_trials_are_the_dark_lines(tmp_path):
    """Optuna turns the colours round, and draws no best value, where it is not told that higher is better."""
    spec, records = searched(tmp_path, rising, trials=4, baselines=(), pruning=False)
    charts = draw_charts(spec, records, tmp_path, important=False)
    history, parallel = (json.loads(chart.figure)["data"] for chart in charts)
    shades = {line["customdata"][0][1]: line["line"]["color"] for line in parallel if "line" in line}
    levels = [sum(map(float, re.findall(r"[\d.]+", shades[key]))) for key in sorted(shades)]
    assert len(levels) == 4 and levels == sorted(levels, reverse=True)
    assert [trace["name"] for trace in history][:2] == ["validation accuracy", "Best Value"]


def test_plots_are_left_out_where_there_is_nothing_to_show(tmp_path):
    spec, records = searched(tmp_path, rising, trials=2, baselines=(), diverging=(0, 1))
    assert {record.state for record in records} == {"pruned"}
    assert [c.kind for c in draw_charts(spec, records, tmp_path, important=False)] == ["parallel"]
    assert draw_charts(spec, [], tmp_path, important=False) == []
    _, one = searched(tmp_path / "one", rising, trials=1, baselines=())
    assert [c.kind for c in draw_charts(spec, one, tmp_path, important=False)] == ["history", "parallel"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("demo", True, None), "exclude each other"),
        ((None, False, None), "which study"),
        (("demo", False, "x"), "--output is for --all"),
    ],
)
def test_one_study_or_all(arguments, words):
    with pytest.raises(UsageError, match=words):
        check_choice(*arguments)
    check_choice("demo", False, None)
    check_choice(None, True, None)


def test_why_the_test_set_was_used_again_stands_on_the_page(here, tmp_path):
    copy = shutil.copytree(here, tmp_path / "home")
    row = old_row("mine", final(1, 0.5), None).model_copy(update={"reason": "to *see* it", "test_list": "x"})
    record(default_url(copy), row)
    made = write_pages(make_overview(place_in(copy)), tmp_path / "out")
    assert r"again because: to \*see\* it" in made.markdown.read_text(encoding="utf-8")
    assert "again because: to *see* it" in made.html.read_text(encoding="utf-8")
