"""What trials leave on disk, at each instant at which a search may be killed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from caltech_hpo.search.trial_files import NONE_BETTER, TrialFiles, best_weights


@pytest.fixture
def folders(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints", tmp_path / "models"


def running(number, best):
    result = SimpleNamespace(validation_top1=best, seconds=1000.0)
    return SimpleNamespace(
        trial=SimpleNamespace(number=number), recipe="recipe", results=[result], best=result
    )


def trained(folder, number):
    """What a worker leaves of a complete trial."""
    for name in ("checkpoint", "checkpoint.previous", "checkpoint.1.tmp", "safetensors"):
        (folder / f"trial-{number}.{name}").write_text(str(number))


def names(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_the_best_trials_weights_stay_and_nothing_else(folders):
    files = TrialFiles("demo", *folders, best=NONE_BETTER)
    for number, value, kept in ((0, 0.3, 0), (1, None, 0), (2, 0.2, 0), (3, 0.3, 0), (4, 0.4, 4)):
        assert files.job(running(number, value)).keep == folders[0] / f"trial-{number}.safetensors"
        trained(folders[0], number)
        files.ended(number, value)
        assert names(folders[0])  # until the end is in the database
        files.settle()
        assert names(folders[0]) == []
        assert names(folders[1]) == [f"demo-best-trial{kept}.safetensors"]
        assert (folders[1] / f"demo-best-trial{kept}.safetensors").read_text() == str(kept)
    assert files.job(running(5, 0.1)).above == 0.4


def test_studies_with_similar_names_leave_each_other_alone(folders):
    for study in ("demo", "demo-best-trial1", "demo@2"):
        trained(folders[0], 0)
        files = TrialFiles(study, *folders, best=NONE_BETTER)
        files.ended(0, 0.5)
        files.settle()
    assert len(names(folders[1])) == 3
    found = [len(best_weights(folders[1], study)) for study in ("demo", "demo-best-trial1", "demo@2")]
    assert found == [1, 1, 1]


def test_a_trial_killed_before_its_weights_were_written_lacks_them(folders):
    files = TrialFiles("demo", *folders, best=(0.3, 0))
    one = running(7, 0.5)
    assert not files.lack_weights(one)  # no checkpoint to make them from
    trained(folders[0], 7)
    assert not files.lack_weights(one)
    (folders[0] / "trial-7.safetensors").unlink()
    assert files.lack_weights(one) and not files.lack_weights(running(7, 0.3))
    (folders[0] / "trial-7.safetensors").write_text("7")
    files.ended(7, 0.5)
    files.settle()  # killed here, the trial still runs in the database
    trained(folders[0], 7)
    (folders[0] / "trial-7.safetensors").unlink()
    again = TrialFiles("demo", *folders, best=(0.3, 0))
    assert not again.lack_weights(one)
    again.ended(7, 0.5)
    again.settle()
    assert names(folders[1]) == ["demo-best-trial7.safetensors"]


def test_what_killed_processes_left_is_removed(folders):
    trained(folders[0], 1)
    trained(folders[0], 2)
    (folders[0] / "trial-2.checkpoint.1.tmp").rename(folders[0] / "trial-2.checkpoint.4194305.tmp")
    TrialFiles("demo", *folders, best=NONE_BETTER).tidy({2})
    assert names(folders[0]) == ["trial-2.checkpoint", "trial-2.checkpoint.previous", "trial-2.safetensors"]


def test_of_equal_trials_the_earlier_ones_weights_stay(folders):
    """As the records have it: the best is the earliest of equals."""
    files = TrialFiles("demo", *folders, best=NONE_BETTER)
    for number, kept in ((4, 4), (3, 3), (5, 3)):
        above = files.job(running(number, 0.9)).above
        assert (above < 0.9) == (number != 5)
        trained(folders[0], number)
        files.ended(number, 0.9)
        files.settle()
        assert names(folders[1]) == [f"demo-best-trial{kept}.safetensors"]


def test_what_has_ended_is_left_alone_until_it_is_put_away(folders):
    files = TrialFiles("demo", *folders, best=NONE_BETTER)
    trained(folders[0], 1)
    files.ended(1, 0.5)
    files.tidy({2})  # another trial's worker died in between
    files.settle()
    assert names(folders[1]) == ["demo-best-trial1.safetensors"]


def test_a_best_trial_whose_search_was_killed_before_it_was_put_away(folders):
    trained(folders[0], 1)
    TrialFiles("demo", *folders, best=(0.5, -1)).tidy(set())
    assert names(folders[1]) == ["demo-best-trial1.safetensors"] and names(folders[0]) == []


def test_without_a_folder_there_are_no_files(tmp_path):
    files = TrialFiles("demo", None, None, best=NONE_BETTER)
    job = files.job(running(0, 0.1))
    assert job.keep is None and job.checkpoint is None and not files.lack_weights(running(0, 0.1))
    files.ended(0, 0.1)
    files.settle()
    files.tidy(set())
