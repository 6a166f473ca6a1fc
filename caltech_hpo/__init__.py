"""caltech-hpo: hyperparameter search for image classifiers.

`load_study`, `search`, `confirm`, `final` and `predict` do what the commands do.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["confirm", "final", "load_study", "predict", "search"]

if TYPE_CHECKING:
    from caltech_hpo.results.library import confirm, final, load_study, predict, search


def __getattr__(name: str) -> Any:
    # The library is imported when it is used: every command imports this package, and is to start at once.
    if name in __all__:
        return getattr(importlib.import_module("caltech_hpo.results.library"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
