"""Both executors on real data; real processes that die, are replaced, and are told to stop."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from helpers import eager_worker, gated_worker, talkative_worker, write_folders

from caltech_hpo.data.dataset import scan
from caltech_hpo.data.loading import load_search_data
from caltech_hpo.errors import CaltechHpoError, UsageError, WeightsError
from caltech_hpo.search import measuring, underway
from caltech_hpo.search.executors import ProcessExecutor
from caltech_hpo.search.inline import InlineExecutor
from caltech_hpo.search.messages import (
    Died,
    EpochDone,
    EpochPart,
    Failed,
    Finished,
    Job,
    Measure,
    Paused,
    Underway,
    WorkerConfig,
    Working,
)
from caltech_hpo.search.planning import time_kinds, warm_up
from caltech_hpo.search.spawning import dismiss, started_early
from caltech_hpo.search.worker import worker_main
from caltech_hpo.spec import Hyperparameters, Recipe


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("executors")
    data = load_search_data(scan(write_folders(folder / "images")), 36, folder / "cache")
    return WorkerConfig(data, "cpu", 1, Hyperparameters(architecture="resnet18"))


def recipe(**changes):
    values = {
        "architecture": "resnet18", "resize": 36, "crop": 32, "batch_size": 3, "learning_rate": 0.01,
        "epochs": 2, "precision": "fp32", "classes": 3, "data": "x",
    }  # fmt: skip
    return Recipe.model_validate(values | changes)


def heard(executor):
    """The next event but those of mid-epoch, of which there are as many as the machine is slow."""
    while isinstance(event := executor.next_event(), Underway):
        pass
    return event


def play(executor, job, stop_after=99):
    """Submits a job and answers its epochs; returns all events."""
    executor.submit(job)
    events = [heard(executor)]
    while isinstance(events[-1], EpochDone):
        executor.answer(job.number, len(events) < stop_after)
        events.append(heard(executor))
    return events


def scores(events):
    return [event.result.model_dump(exclude={"seconds"}) for event in events if isinstance(event, EpochDone)]


def test_inline_and_processes_train_alike(config, tmp_path):
    shown = []
    inline = InlineExecutor(config)
    local = ProcessExecutor(config, 1, progress=lambda *what: shown.append(what))
    assert shown == [("workers that are ready", done, 1) for done in (0, 1)]  # torch is imported for seconds
    try:
        assert inline.ready == local.ready
        assert inline.ready.precision in ("bf16", "fp32") and "torch" in inline.ready.versions
        here = play(inline, Job(0, recipe()))
        there = play(local, Job(0, recipe(), keep=tmp_path / "best.safetensors"))
        assert scores(here) == scores(there) and len(scores(here)) == 2
        assert here[-1] == there[-1] == Finished(0)
        assert (tmp_path / "best.safetensors").stat().st_size > 40_000_000
        assert scores(play(local, Job(1, recipe()))) == scores(here)  # a warm worker remembers nothing
        stopped = play(local, Job(2, recipe(epochs=9)), stop_after=1)
        assert len(scores(stopped)) == 1 and stopped[-1] == Finished(2)
        for executor in (inline, local):
            failed = play(executor, Job(3, recipe(weights="absent.pth")))[-1]
            assert isinstance(failed, Failed) and failed.kind == "refused" and "absent.pth" in failed.message
            other = play(executor, Job(5, recipe(weights="README.md", weights_sha256="0" * 64)))[-1]
            assert isinstance(other, Failed) and "README.md" in other.message
            bug = play(executor, Job(4, recipe(classes=2)))[-1]  # labels beyond the head
            assert isinstance(bug, Failed) and bug.kind == "bug" and "Traceback" in bug.message
            assert executor.free == 1
    finally:
        local.close()


def test_workers_that_were_started_early_are_taken_or_ended(config):
    """One that died meanwhile has a successor; those that nobody takes do not stay."""
    with started_early(4) as early:
        processes = [process for process, _ in early]
        dismiss(early, keep=3)
        assert len(early) == 3 and [process.is_alive() for process in processes] == [True] * 3 + [False]
        early[-1][0].kill()
        executor = ProcessExecutor(config, 2, early=early)
        try:
            assert len(early) == 1 and early[0][0].is_alive()
            assert scores(play(executor, Job(0, recipe())))
        finally:
            executor.close()
    assert not any(process.is_alive() for process in processes)


def test_all_workers_take_their_first_steps_at_once(config):
    """A recipe each; one that fails, and a worker that dies of it, hold up nobody."""
    executor, shown, given = ProcessExecutor(config, 3), [], []
    submit = executor.submit

    def submitted(job):
        submit(job)
        given.append(job)
        if len(given) == 3:
            executor.kill(job.number)

    executor.submit = submitted
    try:
        warm_up(executor, [recipe(), recipe(classes=2)], lambda *what: shown.append(what))
        assert [(job.number, job.recipes) for job in given] == [
            (-1, (recipe(),)), (-2, (recipe(classes=2),)), (-3, (recipe(),))
        ]  # fmt: skip
        assert shown == [("workers that have taken their first steps", done, 3) for done in (1, 2, 3)]
        assert executor.free == 3 and scores(play(executor, Job(0, recipe())))
    finally:
        executor.close()


def test_steps_that_find_no_memory_are_left_out(config, monkeypatch):
    def full(recipe, *args, **options):
        if recipe.batch_size == 4:
            raise torch.OutOfMemoryError("4 images at a time\nneed more")
        return time_steps(recipe, *args, **options)

    time_steps = measuring.time_steps
    monkeypatch.setattr(measuring, "time_steps", full)
    executor = InlineExecutor(config)
    executor.submit(Measure(-1, tuple(recipe(batch_size=size) for size in (4, 3)), 60.0))
    while isinstance(event := executor.next_event(), Working):
        pass
    assert [time.kind.batch_size for time in event.times] == [3]
    assert event.problem == "4 images at a time" and event.peak > 0


def test_no_free_worker_times_no_steps():
    """A cluster's workers may be lost while they warm up, and be placed again later."""
    lost = SimpleNamespace(free=0)
    assert time_kinds(lost, [], 1.0, None).times == ()


@pytest.mark.parametrize(("threads", "number"), [(0, "SIGINT"), (1, "SIGINT"), (0, "SIGTERM")])
def test_an_interrupt_while_a_process_starts_comes_afterwards(threads, number):
    """And never to the process that is started. A library's thread may be what the system interrupts."""
    code = (
        "import os, signal, subprocess, sys, threading, time\n"
        f"for _ in range({threads}):\n"
        "    threading.Thread(target=time.sleep, args=(2,), daemon=True).start()\n"
        "from caltech_hpo.search.spawning import worker_environment\n"
        "signal.signal(signal.SIGTERM, signal.default_int_handler)\n"
        "try:\n"
        "    with worker_environment():\n"
        f"        os.kill(os.getpid(), signal.{number})\n"
        "        child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "        child.send_signal(signal.SIGINT)\n"
        "        time.sleep(0.5)\n"
        "        alive = child.poll() is None\n"
        "        child.kill()\n"
        "except KeyboardInterrupt:\n"
        "    print('interrupted', alive, child.wait())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "interrupted True -9\n", done.stderr


def test_in_mid_epoch_a_worker_says_where_it_is(config):
    """Of each epoch anew; its training is that of one that says nothing."""
    executor = ProcessExecutor(config, 1, target=talkative_worker)
    try:
        executor.submit(Job(0, recipe(epochs=2)))
        events = [executor.next_event()]
        while not isinstance(events[-1], Finished):
            if isinstance(events[-1], EpochDone):
                executor.answer(0, True)
            events.append(executor.next_event())
    finally:
        executor.close()
    told = [dataclasses.astuple(event.part) for event in events if isinstance(event, Underway)]
    # after each of three batches, and while the validation images are scored
    assert {(epoch, images, 9) for epoch in (1, 2) for images in (3, 6, 9)} <= set(told)
    assert told == sorted(told) and scores(events) == scores(play(InlineExecutor(config), Job(0, recipe())))


def test_an_epoch_that_is_fast_tells_of_itself(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(underway.time, "monotonic", lambda: now[0])
    state, told = SimpleNamespace(epoch=1, images=0), []
    asked = underway.telling(7, state, 10, lambda: state.images == 10, told.append)
    for epoch, images, passed in ((1, 5, 3.0), (2, 5, 3.0), (2, 9, 3.0), (2, 10, 3.0)):
        state.epoch, state.images, now[0] = epoch, images, now[0] + passed
        assert asked() == (images == 10)
    assert told == [Underway(7, EpochPart(2, 10, 10))]


def test_an_endless_epoch_does_not_fill_the_pipe(monkeypatch):
    now, told = [0.0], []
    monkeypatch.setattr(underway.time, "monotonic", lambda: now[0])
    asked = underway.telling(7, SimpleNamespace(epoch=1, images=3), 10, lambda: False, told.append)
    for _ in range(2 * 24 * 3600):
        now[0] += 1.0
        asked()
    assert 300 < len(told) < 500 and len(told) * len(pickle.dumps(told[0])) < 100_000


@pytest.fixture
def gated(tmp_path):
    """Two workers of made-up epochs with a job each, and the first one's successor, which cannot be ready."""
    executor = ProcessExecutor(tmp_path, 2, target=gated_worker)
    try:
        for number in (0, 1):
            executor.submit(Job(number, recipe()))
        executor.kill(0)
        seen = []
        while Died(0, -signal.SIGKILL) not in seen:
            seen.append(executor.next_event())
            if isinstance(seen[-1], EpochDone):
                executor.answer(seen[-1].job, True)
        executor.submit(Job(0, recipe()))
        yield executor
    finally:
        executor.close()


def killed_in_its_start(executor):
    (starting,) = [worker for worker in executor._workers if worker.job == 0]
    assert not starting.ready
    executor.kill(0)
    starting.process.join()


def test_a_dead_workers_successor_holds_up_nobody(gated, tmp_path):
    executor = gated
    for number in range(5):
        if number == 2:
            killed_in_its_start(executor)  # the job waits for the next one
        event = executor.next_event()
        assert isinstance(event, EpochDone) and event.job == 1
        executor.answer(1, number < 4)
    assert executor.next_event() == Finished(1)
    assert executor.next_event(0.2) is None and executor.free == 1
    (tmp_path / "go").touch()
    event = executor.next_event()
    assert isinstance(event, EpochDone) and event.job == 0
    executor.answer(0, False)
    assert executor.next_event() == Finished(0) and executor.free == 2


def test_a_worker_that_never_becomes_ready_ends_the_search(gated):
    with pytest.raises(CaltechHpoError, match="killed 3 times before it was ready"):
        for _ in range(3):
            killed_in_its_start(gated)
            for _ in range(20):  # the other one goes on
                gated.answer(gated.next_event().job, True)


def settled(executor):
    """All events until the job's last, answered with "go on"."""
    events = [heard(executor)]
    while isinstance(events[-1], (EpochDone, Working)):
        if isinstance(events[-1], EpochDone):
            executor.answer(events[-1].job, True)
        events.append(heard(executor))
    return events


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory):
    """A recipe, and the epochs and best weights of a training that nothing interrupted."""
    many = recipe(epochs=5, augmentation="random_crop_flip", dropout=0.2)
    best = tmp_path_factory.mktemp("alone") / "best"
    expected = scores(play(InlineExecutor(config), Job(0, many, best)))
    return many, expected, best.read_bytes()


def test_a_job_goes_on_from_its_checkpoint(config, alone, tmp_path):
    """Paused, its worker asked to end, and killed: the epochs are those of one that was left alone."""
    many, expected, weights = alone
    file, kept = tmp_path / "checkpoints" / "trial-0.checkpoint", tmp_path / "best"
    executor = ProcessExecutor(config, 1, target=eager_worker)
    told, pids = [], set()
    try:
        for how in ("pause", "terminate", "kill"):
            begun = submitted(executor, Job(1, many, kept, file, len(scores(told))))
            pid = executor._workers[0].process.pid
            if how == "pause":
                executor.pause()
            else:
                os.kill(pid, signal.SIGTERM if how == "terminate" else signal.SIGKILL)
            executor.answer(1, True)
            begun += settled(executor)
            last = {"pause": [Paused(1)], "kill": [Died(1, -signal.SIGKILL)]}.get(
                how, [Paused(1), Died(1, 0)]
            )
            assert begun[-1] in last and executor.free == 1 and file.exists()
            told += begun[:-1]
            pids.add(pid)
        told += submitted(executor, Job(1, many, kept, file, len(scores(told))))
        executor.answer(1, True)
        told += settled(executor)
        assert told[-1] == Finished(1) and scores(told) == expected and kept.read_bytes() == weights
        assert len(pids) == 2  # of the worker that was asked to end, and of its successor
        # what the supervisor does not know, though it was trained, is told again
        again = settled_job(executor, Job(2, many, checkpoint=file, known=1))
        assert scores(again) == expected[1:] and all(event.before for event in again[:-1])
        assert not told[0].before
        settled_job(executor, Job(3, many, tmp_path / "not better", above=1.0))
        assert not (tmp_path / "not better").exists()
    finally:
        executor.close()
    assert not multiprocessing.active_children()


def submitted(executor, job):
    """Submits a job and waits for its first epoch; a worker that was asked to end may have ended by now."""
    executor.submit(job)
    event = heard(executor)
    if isinstance(event, Died):
        return submitted(executor, job)
    assert isinstance(event, EpochDone)
    return [event]


def settled_job(executor, job):
    executor.submit(job)
    return settled(executor)


@pytest.mark.parametrize("how", ["dies", "sends SIGTERM"])
def test_a_worker_that_gets_no_answer_to_an_epoch_saves_it(config, alone, tmp_path, monkeypatch, how):
    """Its supervisor is gone, or busy and ends: epochs since the last checkpoint would be lost otherwise."""
    many, expected, _ = alone
    file = tmp_path / "trial-0.checkpoint"
    handlers = {}
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    ours, theirs = multiprocessing.Pipe()
    ours.send(Job(0, many, checkpoint=file))

    def vanish():
        ours.recv()  # ready
        while isinstance(event := ours.recv(), Underway):
            pass
        told.append(event)
        if how == "dies":
            ours.close()
        else:
            handlers[signal.SIGTERM]()

    told = []
    with ThreadPoolExecutor() as supervisor:
        supervisor.submit(vanish)
        worker_main(theirs, config)
    assert scores(told) == expected[:1] and file.exists()
    assert scores(play(InlineExecutor(config), Job(1, many, checkpoint=file, known=1))) == expected[1:]


def test_the_first_epochs_time_counts_for_its_checkpoint(config, tmp_path, monkeypatch):
    """It may have taken ten minutes, like the others."""
    from caltech_hpo.search import worker

    monkeypatch.setattr(worker, "CHECKPOINT_EVERY", 0.005)  # less than an epoch, more than what lies between
    executor, file = InlineExecutor(config), tmp_path / "trial-0.checkpoint"
    executor.submit(Job(0, recipe(epochs=3), checkpoint=file))
    executor.next_event()
    assert not file.exists()
    executor.answer(0, True)
    executor.next_event()
    assert file.exists()


def test_a_checkpoint_of_another_recipe_is_left_alone(config, tmp_path):
    file = tmp_path / "trial-0.checkpoint"
    executor = InlineExecutor(config)
    executor.submit(Job(0, recipe(epochs=3), checkpoint=file))
    executor.next_event()
    executor.pause()
    executor.answer(0, True)
    assert executor.next_event() == Paused(0)
    other = recipe(epochs=3, learning_rate=0.02)
    assert scores(play(executor, Job(1, other, checkpoint=file))) == scores(play(executor, Job(2, other)))


def test_workers_end_with_the_executor_even_in_mid_epoch(config):
    executor = ProcessExecutor(config, 1)
    executor.submit(Job(0, recipe(epochs=10_000)))
    executor.close()
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"device": "cuda:99"}, UsageError),
        (
            {"recipe": Hyperparameters(architecture="resnet18", weights="absent.pth")},
            WeightsError,
        ),
    ],
)
def test_what_a_worker_refuses_is_raised_before_any_job(config, change, error):
    with pytest.raises(error):
        ProcessExecutor(dataclasses.replace(config, **change), 1)
    assert not multiprocessing.active_children()
    with pytest.raises(error):
        InlineExecutor(dataclasses.replace(config, **change))


def test_a_worker_is_told_how_much_memory_it_may_use(config):
    from caltech_hpo.search.worker import open_worker
    from caltech_hpo.training.memory_estimate import needed_bytes
    from caltech_hpo.training.prepare import prepare

    context = open_worker(config)
    made = recipe(batch_size=48)
    *_, prepared = prepare(made, context.training, context.validation, context.device)
    room = 2 * needed_bytes(made, prepared)(3)
    executor = InlineExecutor(dataclasses.replace(config, workers=2, memory=room))
    events = play(executor, Job(0, made))
    assert [event.result.micro_batch for event in events[:-1]] == [3, 3]
    too_little = InlineExecutor(dataclasses.replace(config, memory=1 << 20))
    (failed,) = play(too_little, Job(0, made))
    assert isinstance(failed, Failed) and failed.kind == "out of memory" and "2 images" in failed.message


def test_memory_that_runs_out_is_an_outcome(config, monkeypatch):
    events = play(InlineExecutor(config), Job(0, recipe(crop=128, resize=128)))
    assert isinstance(events[-1], Failed)  # the cache holds 36 pixels: a bug, not memory
    from caltech_hpo.search import worker

    tried, states = [], []

    def exhausted(_, prepared, state, **options):
        assert not any(earlier() for earlier in states)  # its memory is what this attempt needs
        tried.append(prepared.micro_batch)
        states.append(weakref.ref(state))
        raise torch.OutOfMemoryError("tried to allocate 20 GiB")
        yield

    monkeypatch.setattr(worker, "train", exhausted)
    events = play(InlineExecutor(config), Job(0, recipe(batch_size=9)))
    assert events == [Failed(0, "out of memory", "tried to allocate 20 GiB")]
    assert tried == [None, 4, 2]  # once more with fewer images, as long as it can be less
