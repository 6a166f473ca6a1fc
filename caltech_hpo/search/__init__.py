"""Epochs to trials: the only room that asks, reports, prunes and tells.

Called, this package is `caltech_hpo.results.library.search`: the library's function has the room's name, and
Python binds the name to the package as soon as anything has imported it.
"""

import importlib
import sys
from types import ModuleType
from typing import Any


class _CallableRoom(ModuleType):
    def __call__(self, *args: Any, **options: Any) -> Any:
        return importlib.import_module("caltech_hpo.results.library").search(*args, **options)


sys.modules[__name__].__class__ = _CallableRoom
