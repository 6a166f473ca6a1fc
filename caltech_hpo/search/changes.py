"""Whether a stored study is still the one that its file declares."""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from caltech_hpo.errors import UsageError
from caltech_hpo.spec import StudySpec
from caltech_hpo.study_files import load_study

if TYPE_CHECKING:
    import optuna

SPEC_ATTR, SPEC_HASH_ATTR, DATA_ATTR = "spec", "spec_hash", "data"


def check_unchanged(
    study: optuna.Study, name: str, spec: StudySpec, data: str | None, *, allow_changed: bool
) -> None:
    """Raises UsageError if the stored study was made with another spec, or on other data.

    `data` None leaves the data unchecked.
    """
    stored_json = study.user_attrs.get(SPEC_ATTR)
    if stored_json is None:
        if study.get_trials(deepcopy=False):
            raise UsageError(f"study '{name}' was not made by caltech-hpo", f"use --study {name}@2")
        return
    stored = flatten(with_defaults(stored_json))
    current = flatten(json.loads(spec.model_dump_json()))
    changes = [
        f"  {key}: {stored.get(key, 'absent')} -> {current.get(key, 'absent')}"
        for key in sorted(stored.keys() | current.keys())
        if stored.get(key) != current.get(key) and key not in ("name", "about", "folder")
    ]
    if data is not None and study.user_attrs.get(DATA_ATTR, data) != data:
        changes.append(
            f"  data set: {study.user_attrs[DATA_ATTR]} -> {data} (other images, classes or split)"
        )
    if not changes:
        return
    listing = "\n".join(changes)
    base = name.split("@")[0]
    fresh = f"--study {base}@{next_number(study, name)}"
    # Optuna cannot mix choices in one study, accuracies on other images cannot be compared, and an
    # epoch's number is no percent.
    unmixable = (".choices", "data set:", "pruner.compare_at:")
    if any(mark in line for line in changes for mark in unmixable):
        raise UsageError(
            f"study '{name}' has trials with other choices, data or comparison, which cannot be mixed:"
            f"\n{listing}",
            f"start a new study: {fresh}",
        )
    if not allow_changed:
        raise UsageError(
            f"study '{name}' was made with another specification:\n{listing}",
            f"start a new study: {fresh}; or mix the trials knowingly: --allow-changed",
        )


def with_defaults(stored_json: str) -> Any:
    """A stored spec with the defaults of fields that are younger than it: a new field is no change.

    A spec that today's rules refuse is returned as it was stored.
    """
    with contextlib.suppress(ValidationError):
        stored_json = StudySpec.model_validate_json(stored_json).model_dump_json()
    return json.loads(stored_json)


def study_spec(study: optuna.Study) -> StudySpec:
    """The spec that a study was made with; its file's, if it ended before it was written down.

    Raises UsageError for a study that is not ours.
    """
    stored_json = study.user_attrs.get(SPEC_ATTR)
    if stored_json is None:
        return load_study(study.study_name)
    return StudySpec.model_validate_json(stored_json)


def next_number(study: optuna.Study, name: str) -> int:
    """The K of the next "NAME@K"."""
    number = name.partition("@")[2]
    return int(number) + 1 if number.isdigit() else 2


def flatten(document: Any, prefix: str = "") -> dict[str, str]:
    """A nested document as {"a.b[0]": "value"}; lists of plain values stay whole."""
    if isinstance(document, dict):
        items = [(f"{prefix}.{key}" if prefix else key, value) for key, value in document.items()]
    elif isinstance(document, list) and any(isinstance(value, (dict, list)) for value in document):
        items = [(f"{prefix}[{i}]", value) for i, value in enumerate(document)]
    else:
        return {prefix: json.dumps(document)}
    return {key: text for name, value in items for key, text in flatten(value, name).items()}
