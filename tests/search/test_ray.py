"""Workers on a real Ray cluster of two nodes: a node is killed in mid-trial, and nothing is lost."""

from __future__ import annotations

from dataclasses import replace

import pytest
from helpers import write_folders, writing_worker

from caltech_hpo.data.cache import write_whole
from caltech_hpo.data.dataset import scan
from caltech_hpo.data.loading import load_search_data
from caltech_hpo.errors import UsageError
from caltech_hpo.search import ray_executor, relay
from caltech_hpo.search.events import TrialEnded, TrialEpoch, TrialPaused, TrialResumed, TrialStarted
from caltech_hpo.search.executors import ProcessExecutor
from caltech_hpo.search.inline import InlineExecutor
from caltech_hpo.search.messages import STARTING, EpochDone, Finished, Job, Paused, WorkerConfig
from caltech_hpo.search.records import trial_records
from caltech_hpo.search.relay import Relay
from caltech_hpo.search.request import Cluster, Place, SearchRequest
from caltech_hpo.search.run import open_search
from caltech_hpo.search.space import Binding, recipe_for
from caltech_hpo.search.storage import stored_study
from caltech_hpo.search.urls import default_url
from caltech_hpo.study_files import load_study

VALUES = {"learning_rate": 0.01, "epochs": 12, "batch_size": 32, "augmentation": "center_crop"}


@pytest.fixture(scope="module")
def cluster():
    """A head that takes no workers, and one node that takes one; the test adds and kills nodes."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster as LocalCluster

    memory = {"object_store_memory": 100 << 20}
    made = LocalCluster(initialize_head=True, head_node_args={"num_cpus": 0, **memory})
    made.ours = made.add_node(num_cpus=1, **memory)
    made.memory = memory
    ray.init(address=made.address, log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.mark.timeout(600)  # Ray starts a dozen processes
def test_a_killed_node_costs_nothing(cluster, tmp_path):
    images = write_folders(tmp_path / "images", images=12)
    place = Place(tmp_path / "home", default_url(tmp_path / "home"), images)
    request = SearchRequest(
        "demo", 1, device="cpu", baselines=False, enqueue=(VALUES,), cluster=Cluster(cluster.address, cpus=1)
    )
    events, killed, shown = [], False, []
    with open_search(request, place, progress=lambda *told: shown.append(told)) as opened:
        for event in opened.events:
            events.append(event)
            if isinstance(event, TrialEpoch) and event.result.epoch == 4 and not killed:
                killed = True
                cluster.remove_node(cluster.ours, allow_graceful=False)
            if isinstance(event, TrialPaused):  # it waits for a machine, and the supervisor does not block
                cluster.ours = cluster.add_node(num_cpus=1, **cluster.memory)
    assert {(STARTING, 0, 1), (STARTING, 1, 1)} <= set(shown)
    assert [event.number for event in events if isinstance(event, TrialStarted)] == [0]
    assert any(isinstance(event, TrialResumed) for event in events)
    assert [event.result.epoch for event in events if isinstance(event, TrialEpoch)] == list(range(1, 13))
    (ended,) = [event for event in events if isinstance(event, TrialEnded)]
    (record,) = trial_records(stored_study(place.storage, "demo"))
    assert (ended.state, record.state, len(record.epochs)) == ("complete", "complete", 12)
    assert list((place.home / "models").glob("demo-best-trial0.safetensors"))
    assert not list(place.home.glob(".demo.shared"))
    # what it found is what a worker of this process finds
    data = load_search_data(scan(images), record.recipe.resize, place.cache)
    executor = InlineExecutor(WorkerConfig(data, "cpu", 1, record.recipe))
    executor.submit(Job(0, record.recipe))
    curve = []
    while not isinstance(event := executor.next_event(), Finished):
        if isinstance(event, EpochDone):
            curve.append(event.result)
            executor.answer(0, True)
    assert [e.training_loss for e in curve] == [e.training_loss for e in record.epochs]


def test_a_cluster_without_room_says_so(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_executor, "READY_WITHIN", 2.0)
    images = write_folders(tmp_path / "images")
    place = Place(tmp_path / "home", default_url(tmp_path / "home"), images)
    request = SearchRequest(
        "demo", 1, device="cpu", baselines=False, cluster=Cluster(cluster.address, cpus=99)
    )
    with pytest.raises(UsageError, match="no room for a worker"), open_search(request, place):
        pass


def test_files_travel_where_folders_are_not_shared(tmp_path, monkeypatch):
    monkeypatch.setattr(
        relay, "ProcessExecutor", lambda config, workers: ProcessExecutor(config, workers, writing_worker)
    )
    monkeypatch.setattr(relay.tempfile, "gettempdir", lambda: str(tmp_path / "there"))
    monkeypatch.setattr(relay.tempfile, "tempdir", str(tmp_path / "there"))
    (tmp_path / "there").mkdir()
    images = write_folders(tmp_path / "images", images=12)
    spec = load_study("demo")
    data = load_search_data(scan(images), spec.recipe.resize, tmp_path / "cache")
    recipe = recipe_for(spec, VALUES | {"epochs": 3}, Binding(3, data.fingerprint, 0, "fp32"))
    job = Job(0, recipe, tmp_path / "home" / "best.safetensors", tmp_path / "home" / "trial.checkpoint")
    config = WorkerConfig(data, "cpu", 1, recipe)

    def placed():
        made = Relay(config, tmp_path / "home" / "mark", "token")
        missing = made.missing()
        made.start(missing, *(path.read_bytes() for path in missing))
        return made, missing

    first, missing = placed()
    assert missing == [data.training_cache, data.validation_cache]
    event, files = first.submit(job, {})
    arrived = dict(files)
    while not (isinstance(event, EpochDone) and event.result.epoch == 2):
        event, files = first.answer(0, True) if isinstance(event, EpochDone) else first.next_event()
        arrived |= files
    first.close()  # as if its machine were gone: what has arrived is all there is
    assert set(arrived) == {job.checkpoint} and not (tmp_path / "home").exists()
    second, missing = placed()
    assert missing == []  # the pixels are still on that machine
    event, files = second.submit(replace(job, known=1), arrived)
    epochs = []
    while not isinstance(event, (Finished, Paused)):
        if isinstance(event, EpochDone):
            epochs.append((event.result.epoch, event.result.validation_top1))
        event, files = second.answer(0, True) if isinstance(event, EpochDone) else second.next_event()
        arrived |= files
    second.close()
    assert epochs == [(2, 0.2), (3, 0.2)] and isinstance(event, Finished)  # from the checkpoint of epoch 2
    assert arrived == {job.checkpoint: b"3", job.keep: b"weights"}
    assert not list((tmp_path / "there").glob("caltech-hpo-[!p]*"))


def test_the_supervisor_knows_its_own_folders(tmp_path):
    write_whole(tmp_path / "mark", b"token")
    config = WorkerConfig(None, "cpu", 1, load_study("demo").recipe)
    assert Relay(config, tmp_path / "mark", "token").missing() == []
