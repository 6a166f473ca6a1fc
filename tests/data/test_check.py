"""What `data check` finds."""

from __future__ import annotations

import shutil

from caltech_hpo.data.check import check
from caltech_hpo.data.dataset import scan


def test_counts_faults_and_leaks(folders):
    index = scan(folders)
    assert not check(index).unreadable and not check(index).identical
    shutil.copy(folders / index.test[0].path, folders / index.training[0].path)
    (folders / index.validation[0].path).write_bytes(b"not an image")
    result = check(scan(folders))
    assert [(row.name, row.training, row.validation, row.test) for row in result.classes] == [
        ("ant", 3, 3, 3),
        ("Bee", 3, 3, 3),
        ("cat", 3, 3, 3),
    ]
    assert list(result.unreadable) == [f"validation: {index.validation[0].path}"]
    assert result.identical == ((f"training: {index.training[0].path}", f"test: {index.test[0].path}"),)
