"""How a training that does not finish ends `final`."""

from __future__ import annotations

import pytest

from caltech_hpo.errors import CaltechHpoError
from caltech_hpo.results.final import _failure
from caltech_hpo.search.messages import Died, Failed, WorkerBugError


@pytest.mark.parametrize(
    ("event", "kind", "words"),
    [
        (Failed(0, "bug", "Traceback ..."), WorkerBugError, "Traceback"),
        (Failed(0, "out of memory", "20 GiB"), CaltechHpoError, "out of memory: 20 GiB"),
        (Died(0, -9), CaltechHpoError, "exit code -9"),
    ],
)
def test_a_bug_keeps_its_traceback_and_the_rest_gets_one_line(event, kind, words):
    error = _failure(event)
    assert type(error) is kind and words in str(error)
