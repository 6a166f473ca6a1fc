"""The supervisor's loop on a worker that returns made-up epochs, over a real SQLite database."""

from __future__ import annotations

import math
from types import SimpleNamespace

import optuna
import pytest
from optuna.trial import TrialState

from caltech_hpo.errors import CaltechHpoError, StorageFullError
from caltech_hpo.search import running
from caltech_hpo.search import supervisor as supervisor_module
from caltech_hpo.search.events import (
    NoRoom,
    Requeued,
    TrialEnded,
    TrialEpoch,
    TrialPaused,
    TrialResumed,
    TrialStarted,
    TrialUnderway,
    TrialWorking,
)
from caltech_hpo.search.messages import (
    Died,
    EpochDone,
    EpochPart,
    Failed,
    Finished,
    Midway,
    Paused,
    Ready,
    Underway,
    WorkerBugError,
    Working,
)
from caltech_hpo.search.records import best_record, finished_count, trial_records
from caltech_hpo.search.space import Binding, suggest
from caltech_hpo.search.storage import open_storage, open_study
from caltech_hpo.search.supervisor import Supervisor
from caltech_hpo.search.urls import default_url
from caltech_hpo.search.write_through import hold
from caltech_hpo.spec import Baseline, EpochResult, PrunerSpec, Published
from caltech_hpo.study_files import complete_params, load_study

BINDING = Binding(classes=10, data="x", seed=0, precision="fp32")


def epoch(number, accuracy, loss=1.0):
    return EpochResult(
        epoch=number, learning_rate=0.1, training_loss=loss, validation_loss=1.0,
        validation_top1=accuracy, images=10, seconds=1.0,
    )  # fmt: skip


def steady(job):
    """Accuracy 0.5 in every epoch of the recipe."""
    for number in range(1, job.recipe.epochs + 1):
        yield EpochDone(job.number, epoch(number, 0.5))
    yield Finished(job.number)


class Scripted:
    """An executor whose workers play a script, one event of each in turn."""

    def __init__(self, script=steady, workers=1, bursts=True):
        self.script, self.workers, self.bursts = script, workers, bursts
        self.jobs, self.events, self.stopped, self.most = [], {}, set(), 0
        self.paused = False
        self.ready = Ready("cpu", "fp32", {"torch": "0"})

    @property
    def free(self):
        return self.workers - len(self.events)

    def submit(self, job):
        assert self.free > 0
        self.jobs.append(job)
        told = self.script(job)  # a worker does not tell again what is known
        self.events[job.number] = (
            event for event in told if not isinstance(event, EpochDone) or event.result.epoch > job.known
        )
        self.most = max(self.most, len(self.events))

    def event_within(self, seconds):
        return self.bursts and len(self.jobs) % 2 == 0  # of every second trial, epochs come in bursts

    def next_event(self, seconds=None):
        number = next(iter(self.events))
        script = self.events.pop(number)
        event = Finished(number) if number in self.stopped else next(script)
        if self.paused and isinstance(event, EpochDone):
            event = Paused(number)
        if isinstance(event, EpochDone | Midway):
            self.events[number] = script  # to the end of the line
        return event

    def answer(self, job, go_on):
        if not go_on:
            self.stopped.add(job)

    def pause(self):
        self.paused = True

    def close(self):
        pass


@pytest.fixture
def storage(tmp_path):
    return open_storage(default_url(tmp_path))


SPEC = load_study("demo")


def supervise(storage, executor, trials, spec=SPEC, **options):
    study = open_study(storage, "demo", spec, "x", sampler_seed=0, allow_changed=True)
    run = Supervisor(*hold(study, storage), spec, executor, BINDING, **options)
    return study, list(run.run(trials))


@pytest.mark.parametrize("workers", [1, 2, 4, 8])
def test_n_trials_asked_are_n_trials_finished(storage, workers):
    executor = Scripted(workers=workers)
    study, events = supervise(storage, executor, 20)
    assert finished_count(trial_records(study)) == len(study.trials) == 20
    assert sum(isinstance(event, TrialStarted) for event in events) == 20
    assert executor.most == workers
    points = {str(trial.params) for trial in study.trials}
    assert len(points) == 20  # the sampler never proposed a point twice


def test_what_an_event_tells_is_in_the_database(storage):
    """Read anew from the file, at every event, whether epochs come in bursts or one by one."""
    study = open_study(storage, "demo", SPEC, "x", sampler_seed=0, allow_changed=False)
    seen = 0
    for event in Supervisor(*hold(study, storage), SPEC, Scripted(workers=2), BINDING).run(5):
        trial = trial_records(study)[event.number]
        if isinstance(event, TrialEpoch):
            assert event.result in trial.epochs
            seen += 1
        elif isinstance(event, TrialEnded):
            assert trial.state == event.state and trial.value == event.value
    assert seen == sum(len(record.epochs) for record in trial_records(study)) > 0


def test_the_same_call_continues_and_then_does_nothing(storage):
    supervise(storage, Scripted(), 2)
    study, events = supervise(storage, Scripted(), 5)
    assert sum(isinstance(event, TrialEnded) for event in events) == 3
    assert supervise(storage, Scripted(), 5)[1] == []
    assert len({str(trial.params) for trial in study.trials}) == 5


def rows(*names):
    return tuple(
        Baseline(name=name, params={"learning_rate": 0.01 * (i + 1), "epochs": 4})
        for i, name in enumerate(names)
    )


@pytest.mark.parametrize("workers", [1, 2, 8])
def test_each_baseline_runs_once_and_first(storage, workers):
    spec = SPEC.model_copy(update={"baselines": rows("a", "b", "c")})
    supervise(storage, Scripted(workers=workers), 2, spec)
    study, _ = supervise(storage, Scripted(workers=workers), 10, spec)
    assert [trial.user_attrs.get("baseline") for trial in study.trials][:4] == ["a", "b", "c", None]
    assert [trial.params["learning_rate"] for trial in study.trials][:3] == [0.01, 0.02, 0.03]
    assert not study.get_trials(states=(TrialState.WAITING,))


def test_baselines_can_be_left_out(storage):
    study, _ = supervise(storage, Scripted(), 2, baselines=False)
    assert not any("baseline" in trial.user_attrs for trial in study.trials)


def test_a_trial_keeps_what_happened(storage):
    def script(job):
        for number, accuracy in enumerate(
            [0.2, 0.6, 0.6, 0.4, 0.3, 0.3, 0.3, 0.3][: job.recipe.epochs], start=1
        ):
            yield EpochDone(job.number, epoch(number, accuracy, loss=1 / number))
        yield Finished(job.number)

    study, _ = supervise(storage, Scripted(script), 1)
    (trial,) = study.trials
    (record,) = trial_records(study)
    assert trial.value == record.value == 0.6  # the best epoch, as the report scores it
    assert trial.user_attrs["best_epoch"] == record.best_epoch == 2
    assert trial.user_attrs["epochs_run"] == len(record.epochs) == trial.params["epochs"]
    assert trial.user_attrs["stop_reason"] == "finished"
    assert trial.user_attrs["final_loss"] == record.final_loss == 1 / trial.params["epochs"]
    for name in ("recipe_hash", "seconds", "device", "precision", "versions"):
        assert name in trial.user_attrs
    assert record.recipe.hash == trial.user_attrs["recipe_hash"]
    assert [record.epochs[0].epoch, record.epochs[1].validation_top1] == [1, 0.6]


def test_divergence_prunes_is_never_best_and_teaches_the_sampler(storage):
    def script(job):
        first = job.number == 0
        for number in range(1, job.recipe.epochs + 1):
            yield EpochDone(job.number, epoch(number, 0.9 if first else 0.5, math.nan if first else 1.0))
        yield Finished(job.number)

    study, events = supervise(storage, Scripted(script), 2)
    assert study.trials[0].state == TrialState.PRUNED
    assert study.trials[0].user_attrs["stop_reason"].startswith("diverged: training loss is nan at epoch 1")
    assert study.trials[0].user_attrs["final_loss"] == "nan"
    assert study.trials[0].user_attrs["epochs_run"] == 1
    assert study.trials[0].system_attrs["caltech_hpo:epoch:1"]["training_loss"] == "NaN"  # NaN is no JSON
    assert math.isnan(trial_records(study)[0].final_loss)
    assert study.best_trial.number == 1 == best_record(trial_records(study)).number
    assert study.trials[0].value == 0.9  # a value that TPE reads for pruned trials
    ended = [event for event in events if isinstance(event, TrialEnded)]
    assert [event.state for event in ended] == ["pruned", "complete"]


def test_a_lagging_trial_is_pruned_after_the_warm_up(storage):
    spec = SPEC.model_copy(update={"pruner": PrunerSpec(name="median", startup_trials=1, warmup_epochs=3)})

    def script(job):
        for number in range(1, job.recipe.epochs + 1):
            yield EpochDone(job.number, epoch(number, 0.5 if job.number == 0 else 0.1))
        yield Finished(job.number)

    study, _ = supervise(storage, Scripted(script), 2, spec)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "PRUNED"]
    assert study.trials[1].user_attrs["epochs_run"] == 3
    assert study.trials[1].user_attrs["stop_reason"] == "lagging: median pruner at epoch 3"


def test_a_row_with_published_figures_runs_to_its_end(storage):
    """Pruned, it could not be compared; one that an earlier version pruned runs again."""
    spec = SPEC.model_copy(
        update={
            "pruner": PrunerSpec(name="median", startup_trials=1, warmup_epochs=1),
            "baselines": (
                Baseline(name="good", params={"epochs": 8}),
                Baseline(name="figures", params={"epochs": 8}, published=Published(validation=0.16)),
                Baseline(name="words", params={"epochs": 8}, published=Published(outcome="diverges")),
            ),
        }
    )

    def script(job):
        for number in range(1, job.recipe.epochs + 1):
            yield EpochDone(job.number, epoch(number, 0.5 if job.number == 0 else 0.1))
        yield Finished(job.number)

    study, _ = supervise(storage, Scripted(script), 3, spec)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "COMPLETE", "PRUNED"]


def test_a_published_row_that_an_earlier_version_pruned_runs_again(storage):
    row = Baseline(name="row", params={"epochs": 4}, published=Published(validation=0.16))
    spec = SPEC.model_copy(update={"baselines": (row,)})
    study, _ = supervise(storage, Scripted(), 1, spec, baselines=False)
    pruned = optuna.trial.create_trial(
        state=TrialState.PRUNED, user_attrs={"baseline": "row", "stop_reason": "lagging: median pruner"}
    )
    study.add_trial(pruned)
    study, _ = supervise(storage, Scripted(), 4, spec)
    assert [trial.user_attrs.get("baseline") for trial in study.trials] == [None, "row", "row", None]


@pytest.mark.parametrize(("compare_at", "state"), [("epoch", "PRUNED"), ("fraction", "COMPLETE")])
def test_a_long_schedule_is_not_behind_a_short_one_at_the_same_fraction(storage, compare_at, state):
    """After 3 epochs the short schedule has made its late jump; three eighths into it, it had not."""
    curves = {4: [0.2, 0.3, 0.7, 0.8], 8: [0.3, 0.4, 0.5, 0.6, 0.75, 0.75, 0.9, 0.9]}

    def script(job):
        for number, accuracy in enumerate(curves[job.recipe.epochs], start=1):
            yield EpochDone(job.number, epoch(number, accuracy))
        yield Finished(job.number)

    pruner = PrunerSpec(name="median", startup_trials=1, warmup_epochs=1, compare_at=compare_at)
    lengths = tuple(Baseline(name=str(n), params={"epochs": n}) for n in (4, 8))
    spec = SPEC.model_copy(update={"pruner": pruner, "baselines": lengths})
    study, _ = supervise(storage, Scripted(script), 2, spec)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", state]
    if compare_at == "fraction":
        reached = [sorted(trial.intermediate_values) for trial in study.trials]
        assert reached == [list(range(25, 101)), list(range(12, 101))]


@pytest.mark.parametrize("compare_at", ["epoch", "fraction"])
def test_a_search_without_pruning_keeps_what_lags_and_ends_what_diverges(storage, compare_at):
    def script(job):
        for number in range(1, job.recipe.epochs + 1):
            loss = math.inf if job.number == 2 and number == 3 else 1.0
            yield EpochDone(job.number, epoch(number, 0.5 / (job.number + 1), loss))
        yield Finished(job.number)

    pruner = PrunerSpec(name="median", startup_trials=1, warmup_epochs=1, compare_at=compare_at)
    spec = SPEC.model_copy(update={"pruner": pruner})
    study, _ = supervise(storage, Scripted(script), 4, spec, pruning=False)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "COMPLETE", "PRUNED", "COMPLETE"]
    study, _ = supervise(storage, Scripted(script), 5, spec)  # the next run prunes again
    at = {"epoch": 1, "fraction": 2}[compare_at]  # no other trial had an epoch behind it at so small a share
    assert study.trials[4].user_attrs["stop_reason"] == f"lagging: median pruner at epoch {at}"


def test_an_interrupted_search_goes_on_with_the_same_trials(storage):
    study = open_study(storage, "demo", SPEC, "x", sampler_seed=0, allow_changed=False)
    run = Supervisor(*hold(study, storage), SPEC, Scripted(workers=2, bursts=False), BINDING).run(4)
    params = [next(run).params for _ in range(2)]
    assert isinstance(next(run), TrialEpoch)
    run.close()  # as after kill -9
    assert [trial.state.name for trial in study.trials] == ["RUNNING", "RUNNING"]
    before = [len(record.epochs) for record in trial_records(study)]
    executor = Scripted()
    study, events = supervise(storage, executor, 4)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 4
    assert [trial.params for trial in study.trials[:2]] == params
    assert [job.known for job in executor.jobs] == [*before, 0, 0] and before[0] == 1
    assert events[0] == TrialResumed(0, params[0], params[0]["epochs"], 1, SPEC.baselines[0].name)
    for record in trial_records(study):
        assert [result.epoch for result in record.epochs] == list(range(1, record.recipe.epochs + 1))
    assert sum("baseline" in trial.user_attrs for trial in study.trials) == 1


def test_a_trial_on_images_of_another_size_begins_anew(storage):
    study = open_study(storage, "demo", SPEC, "x", sampler_seed=0, allow_changed=False)
    run = Supervisor(*hold(study, storage), SPEC, Scripted(bursts=False), BINDING).run(2)
    params = next(run).params
    next(run)
    run.close()
    larger = SPEC.model_copy(update={"recipe": SPEC.recipe.model_copy(update={"resize": 40})})
    study, events = supervise(storage, Scripted(), 2, spec=larger)
    assert events[0] == Requeued(0) and events[1].params == params
    assert [record.state for record in trial_records(study)] == ["failed", "complete", "complete"]
    assert {record.recipe.resize for record in trial_records(study)[1:]} == {40}


def test_a_search_that_is_asked_to_stop_pauses_its_trials(storage):
    study = open_study(storage, "demo", SPEC, "x", sampler_seed=0, allow_changed=False)
    seen = []
    executor = Scripted(workers=2, bursts=False)
    supervisor = Supervisor(*hold(study, storage), SPEC, executor, BINDING)
    for event in supervisor.run(9, stop=lambda: sum(isinstance(e, TrialEpoch) for e in seen) > 2):
        seen.append(event)
    assert executor.paused and {type(event) for event in seen[-2:]} == {TrialPaused}
    running = [trial for trial in study.trials if trial.state == TrialState.RUNNING]
    assert {trial.number for trial in running} == {event.number for event in seen[-2:]}
    study, _ = supervise(storage, Scripted(), 9)
    assert len(study.trials) == 9 and all(t.state == TrialState.COMPLETE for t in study.trials)


def test_a_trial_that_had_ended_but_was_not_told_is_told(storage):
    """Killed between the last epoch and the end of the trial: nothing is trained again."""

    def script(job):
        yield EpochDone(job.number, epoch(1, 0.3))
        yield EpochDone(job.number, epoch(2, 0.5))
        raise RuntimeError("as if it were killed")

    changes = {"recipe": SPEC.recipe.model_copy(update={"epochs": 2}), "baselines": ()}
    short = SPEC.model_copy(update=changes | {"space": {"learning_rate": SPEC.space["learning_rate"]}})
    with pytest.raises(RuntimeError, match="as if"):
        supervise(storage, Scripted(script, bursts=False), 2, short)
    executor = Scripted(script)
    study, events = supervise(storage, executor, 1, short)
    assert [type(event) for event in events] == [TrialResumed, TrialEnded] and not executor.jobs
    assert study.trials[0].state == TrialState.COMPLETE and study.trials[0].value == 0.5


def test_trials_that_never_began_are_asked_for_again(storage):
    study = open_study(storage, "demo", SPEC, "x", sampler_seed=0, allow_changed=False)
    params = suggest(study.ask(), SPEC)  # by an earlier version, killed before it wrote the recipe
    study.ask()
    again, events = supervise(storage, Scripted(), 3)
    assert [type(event) for event in events[:2]] == [Requeued, Requeued]
    states = [trial.state.name for trial in again.trials]
    assert states == ["FAIL", "FAIL", "COMPLETE", "COMPLETE", "COMPLETE"]
    assert again.trials[2].params == params
    assert "before it began" in again.trials[0].user_attrs["stop_reason"]


def test_a_baseline_that_died_while_it_was_asked_for_is_run_again(storage):
    study = open_study(storage, "demo", SPEC, "x", sampler_seed=0, allow_changed=False)
    row = SPEC.baselines[0]
    study.enqueue_trial(complete_params(SPEC, row.params), user_attrs={"baseline": row.name})
    study.ask()  # killed before its parameters were drawn
    study, _ = supervise(storage, Scripted(), 2)
    done = [trial for trial in study.trials if trial.state == TrialState.COMPLETE]
    assert done[0].params == complete_params(SPEC, row.params)
    assert [trial.user_attrs.get("baseline") for trial in done] == [row.name, None]


def test_a_trial_is_given_back_once_even_if_giving_back_was_interrupted(storage):
    study = open_study(storage, "demo", SPEC, "x", sampler_seed=0, allow_changed=False)
    params = suggest(study.ask(), SPEC)
    study.enqueue_trial(params, user_attrs={"repeats_trial": 0})  # and killed before trial 0 was told
    study, _ = supervise(storage, Scripted(), 3)
    assert sum(trial.params == params for trial in study.trials if trial.state == TrialState.COMPLETE) == 1


def failing(kind, times):
    """A script whose first `times` jobs end badly in their second epoch."""

    def script(job):
        yield EpochDone(job.number, epoch(1, 0.3))
        if job.number < times:
            yield Died(job.number, -9) if kind == "died" else Failed(job.number, kind, "line 1\nthe reason")
        else:
            yield Finished(job.number)

    return script


def test_out_of_memory_ends_the_trial_not_the_search(storage):
    study, _ = supervise(storage, Scripted(failing("out of memory", 2)), 2)
    assert [trial.state.name for trial in study.trials] == ["FAIL", "FAIL", "COMPLETE", "COMPLETE"]
    assert study.trials[0].user_attrs["stop_reason"] == "out of memory: the reason"


def test_rows_that_found_no_memory_are_run_by_the_next_search(storage):
    """Three of them end a search; whoever then gives it more memory wants them first, and each once."""
    rows = tuple(Baseline(name=f"row {i}", params={"learning_rate": 0.001 * (i + 1)}) for i in range(4))
    spec = SPEC.model_copy(update={"baselines": rows})
    with pytest.raises(CaltechHpoError, match="3 trials in a row failed"):
        supervise(storage, Scripted(failing("out of memory", 99)), 5, spec)
    study, _ = supervise(storage, Scripted(), 5, spec)
    names = [trial.user_attrs.get("baseline") for trial in study.trials]
    assert names == ["row 0", "row 1", "row 2", "row 0", "row 1", "row 2", "row 3", None]


def test_a_dead_workers_trial_goes_on(storage):
    died = []

    def script(job):
        for number in range(1, job.recipe.epochs + 1):
            yield EpochDone(job.number, epoch(number, 0.3))
            if number == 2 and len(died) < 2:
                died.append(job)
                yield Died(job.number, -9)
                return
        yield Finished(job.number)

    executor = Scripted(script)
    study, events = supervise(storage, executor, 2)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "COMPLETE"]
    assert [(job.number, job.known) for job in executor.jobs] == [(0, 0), (0, 2), (0, 2), (1, 0)]
    assert sum(isinstance(event, TrialResumed) for event in events) == 2
    first = trial_records(study)[0]
    assert [result.epoch for result in first.epochs] == list(range(1, first.recipe.epochs + 1))


def test_a_trial_that_costs_three_workers_fails_and_the_search_goes_on(storage):
    def script(job):
        yield EpochDone(job.number, epoch(1, 0.3))
        yield Died(job.number, -11) if job.number == 1 else Finished(job.number)

    study, events = supervise(storage, Scripted(script), 3)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    assert study.trials[1].user_attrs["stop_reason"] == "its worker died 3 times (last exit code -11)"
    assert sum(isinstance(event, TrialResumed) for event in events) == 2


def test_a_trial_over_its_time_ends_with_its_epoch(storage):
    study, _ = supervise(storage, Scripted(bursts=False), 2, trial_seconds=0.0)
    for trial in study.trials:
        assert trial.state == TrialState.PRUNED and trial.user_attrs["epochs_run"] == 1
        assert trial.user_attrs["stop_reason"] == "timed out: more than 0 minutes at epoch 1"


class Silent(Scripted):
    """Its first two jobs say nothing until they are killed."""

    def next_event(self, seconds=None):
        number = next(iter(self.events))
        if len(self.jobs) < 3 and number not in self.killed:
            return None
        if len(self.jobs) < 3:
            self.killed.remove(number)
            del self.events[number]
            return Died(number, -9)
        return super().next_event(seconds)

    def kill(self, job):
        self.killed.add(job)


def test_a_silent_worker_is_killed_and_its_trial_goes_on(storage, monkeypatch):
    monkeypatch.setattr(running, "HUNG_AT_LEAST", 0.01)
    monkeypatch.setattr(running, "HUNG_EPOCHS", 0.001)
    monkeypatch.setattr(running, "LOOK_EVERY", 0.0)
    supervise(storage, Scripted(), 1)  # an earlier search, from which an epoch's time is known
    executor = Silent(bursts=False)
    executor.killed = set()
    study, events = supervise(storage, executor, 2)
    assert study.trials[1].state == TrialState.COMPLETE and len(study.trials) == 2
    assert sum(isinstance(event, TrialResumed) for event in events) == 2


def test_a_worker_that_speaks_in_mid_epoch_is_not_silent_and_its_caller_hears_it(storage):
    heard = []

    def script(job):
        yield Working(job.number, "features", 1, 2)
        one = run._running[job.number]
        one.heard = -1.0  # long ago
        yield Underway(job.number, EpochPart(1, 5, 10))
        heard.append(one.heard)
        yield from steady(job)

    study = open_study(storage, "demo", SPEC, "x", sampler_seed=0, allow_changed=False)
    run = Supervisor(*hold(study, storage), SPEC, Scripted(script), BINDING, baselines=False)
    events = [event for event in run.run(1) if isinstance(event, (TrialWorking, TrialUnderway))]
    assert events == [TrialWorking(0, "features", 1, 2), TrialUnderway(0, EpochPart(1, 5, 10))]
    assert heard[0] > 0


@pytest.mark.parametrize(
    ("slowest", "away", "killed"),
    [
        (0.001, 5.0, {0}),
        (0.0, 5.0, set()),  # while no epoch's time is known nothing counts as hung
        (0.001, 3600.0, set()),  # the search itself was held up: nobody could have been heard
        (0.001, 0.5, set()),
    ],
)
def test_who_is_silent_is_looked_at_by_the_clock(monkeypatch, slowest, away, killed):
    now = 1000.0
    monkeypatch.setattr(running.time, "monotonic", lambda: now)
    monkeypatch.setattr(running, "HUNG_AT_LEAST", 2.0)
    executor = Silent(bursts=False)
    executor.killed = set()
    watch = running.HungWatch(executor)
    trials = {0: SimpleNamespace(results=[], heard=now - 1), 1: SimpleNamespace(results=[], heard=now + away)}
    now += away
    watch.look(trials, slowest)
    assert executor.killed == killed
    watch.look(trials, slowest)  # at once: it looks no more than once a second
    assert executor.killed == killed


def test_trials_that_had_no_time_to_be_saved_are_told(storage, monkeypatch):
    """By a worker in a batch that takes minutes, say."""
    monkeypatch.setattr(supervisor_module, "PATIENCE", 0.0)

    class Busy(Scripted):
        def next_event(self, seconds=None):
            return super().next_event(seconds) if not self.paused else None

    study = open_study(storage, "demo", SPEC, "x", sampler_seed=0, allow_changed=False)
    run = Supervisor(*hold(study, storage), SPEC, Busy(bursts=False), BINDING, baselines=False)
    asked = iter([False, False, *[True] * 99])
    events = list(run.run(1, stop=lambda: next(asked)))
    assert events[-1] == TrialPaused(0, saved=False) and study.trials[0].state == TrialState.RUNNING


def test_a_worker_that_was_asked_to_end_leaves_its_trial_to_another(storage):
    class Ending(Scripted):
        def next_event(self, seconds=None):
            number = next(iter(self.events))
            if len(self.jobs) == 1:
                del self.events[number]
                return Paused(number)
            return super().next_event(seconds)

    study, events = supervise(storage, Ending(bursts=False), 2)
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 2
    assert [event.number for event in events if isinstance(event, TrialResumed)] == [0]


def test_without_room_the_search_waits_and_says_so_once(storage, monkeypatch):
    monkeypatch.setattr(running, "ROOM_EVERY", 0.01)
    study = open_study(storage, "demo", SPEC, "x", sampler_seed=0, allow_changed=False)
    held, memory = hold(study, storage)
    flush, failing_times = memory.flush, iter(range(12))

    def no_room():
        if next(failing_times, None) is not None:
            raise StorageFullError("studies.db: no room on the disk")
        flush()

    monkeypatch.setattr(memory, "flush", no_room)
    events = list(Supervisor(held, memory, SPEC, Scripted(bursts=False), BINDING).run(2))
    assert events[0] == NoRoom("studies.db: no room on the disk")
    assert sum(isinstance(event, NoRoom) for event in events) == 1
    assert finished_count(trial_records(study)) == 2


@pytest.mark.parametrize("kind", ["out of memory", "died"])
def test_three_failures_in_a_row_end_the_search(storage, kind):
    with pytest.raises(CaltechHpoError, match="3 trials in a row failed"):
        supervise(storage, Scripted(failing(kind, 99)), 5)


def test_a_bug_in_a_worker_ends_the_search_and_is_written_down(storage):
    with pytest.raises(WorkerBugError, match="the reason"):
        supervise(storage, Scripted(failing("bug", 1)), 5)
    study = optuna.load_study(study_name="demo", storage=storage)
    assert study.trials[0].user_attrs["stop_reason"] == "bug: the reason"


def test_after_the_time_is_up_no_trial_begins(storage):
    study = open_study(storage, "demo", SPEC, "x", sampler_seed=0, allow_changed=False)
    events = list(Supervisor(*hold(study, storage), SPEC, Scripted(), BINDING).run(50, seconds=0.0))
    assert events == []


def test_a_refused_job_ends_the_search_with_its_own_words(storage):
    """A weights file that was replaced in mid-search refuses every later trial as well."""

    def script(job):
        yield Failed(job.number, "refused", "w.pth: the file has changed\n  fix: put the file back")

    with pytest.raises(CaltechHpoError, match=r"w.pth: the file has changed\n  fix: put the file back"):
        supervise(storage, Scripted(script), 3)
    (trial,) = optuna.load_study(study_name="demo", storage=storage).trials
    assert trial.user_attrs["stop_reason"] == "refused: w.pth: the file has changed"


@pytest.mark.parametrize("workers", [1, 2])
def test_a_lost_workers_trial_waits_for_the_next_free_one(storage, workers):
    """A cluster's machine is replaced later, or never: then another worker goes on with the trial."""

    class Shrinking(Scripted):
        waited = 0

        def next_event(self, seconds=None):
            if not self.events:  # the last one is being replaced
                self.waited += 1
                self.workers = self.waited // 3
                return None
            event = super().next_event(seconds)
            self.workers -= isinstance(event, Died)
            return event

    def script(job):
        for event in steady(job):
            if isinstance(event, EpochDone) and event.result.epoch == 2 and (job.number, job.known) == (0, 0):
                yield Died(job.number, -9)
            yield event

    executor = Shrinking(script, workers)
    study, events = supervise(storage, executor, 3)
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 3
    mine = [event for event in events if event.number == 0]
    assert [type(event) for event in mine[:4]] == [TrialStarted, TrialEpoch, TrialPaused, TrialResumed]
    told = [event.result.epoch for event in mine if isinstance(event, TrialEpoch)]
    assert told == list(range(1, mine[0].epochs + 1))
    assert executor.waited == (3 if workers == 1 else 0)
