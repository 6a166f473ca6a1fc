"""Whether a stored study is still the one that its file declares."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from caltech_hpo.errors import UsageError
from caltech_hpo.spec import StudySpec

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
    stored = flatten(json.loads(stored_json))
    current = flatten(json.loads(spec.model_dump_json()))
    changes = [
        f"  {key}: {stored.get(key, 'absent')} -> {current.get(key, 'absent')}"
        for key in sorted(stored.keys() | current.keys())
        if stored.get(key) != current.get(key) and key not in ("name", "about")
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
    # Optuna cannot mix choices in one study, and accuracies on other images cannot be compared.
    mixable = not any(".choices" in line or "data set:" in line for line in changes)
    if not mixable:
        raise UsageError(
            f"study '{name}' has trials with other choices or data, which cannot be mixed:\n{listing}",
            f"start a new study: {fresh}",
        )
    if not allow_changed:
        raise UsageError(
            f"study '{name}' was made with another specification:\n{listing}",
            f"start a new study: {fresh}; or mix the trials knowingly: --allow-changed",
        )


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
