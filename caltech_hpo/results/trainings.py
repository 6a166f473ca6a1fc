"""What `final` and `confirm` share: the data that was searched on, and how a training fails."""

from __future__ import annotations

from typing import TYPE_CHECKING

from caltech_hpo.data.cache import Progress
from caltech_hpo.data.dataset import DatasetIndex, scan
from caltech_hpo.errors import CaltechHpoError, DataError
from caltech_hpo.search.changes import DATA_ATTR, study_spec
from caltech_hpo.search.messages import Died, Failed, Paused, WorkerBugError
from caltech_hpo.search.request import Place, Say, silent
from caltech_hpo.search.run import locate_data
from caltech_hpo.spec import Recipe

if TYPE_CHECKING:
    import optuna


SEEDS = 2**32  # how many there are: after the last one comes 0


def seeded(recipe: Recipe, seed: int) -> Recipe:
    """The recipe on another seed, which is taken modulo 2**32."""
    return recipe.model_copy(update={"seed": seed % SEEDS})


def searched_data(
    study: optuna.Study, place: Place, *, progress: Progress | None = None, say: Say = silent
) -> DatasetIndex:
    """The data set of a study, by name. Raises DataError if it is absent or not the one searched on."""
    spec = study_spec(study)
    index = scan(locate_data(spec, place, progress=progress, say=say))
    if index.fingerprint != study.user_attrs[DATA_ATTR]:
        raise DataError(
            f"{index.root}: not the data that study '{study.study_name}' searched on "
            "(other images, classes or split)",
            "give the same folder as for the search: --data DIR",
        )
    return index


def training_failure(event: Failed | Died | Paused) -> Exception:
    """What a training that did not finish raises: a bug is a bug, the rest is the user's to mend."""
    if isinstance(event, Paused):
        return CaltechHpoError("training failed: its worker was asked to end", "run the command again")
    if isinstance(event, Died):
        return CaltechHpoError(
            f"training failed: the worker died (exit code {event.exit_code})", "run the command again"
        )
    if event.kind == "bug":
        return WorkerBugError(event.message)
    return CaltechHpoError(f"training failed: {event.kind}: {event.message}", "mend that and run it again")
