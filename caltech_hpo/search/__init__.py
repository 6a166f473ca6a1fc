"""Epochs to trials: the only room that asks, reports, prunes and tells.

Called, this package is `caltech_hpo.results.library.search`: the library's function has the room's name, and
Python binds the name to the package as soon as anything has imported it.
"""

import importlib
import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


class _CallableRoom(ModuleType):
    def __call__(self, *args: Any, **options: Any) -> Any:
        return _function()(*args, **options)

    @property
    def __signature__(self) -> inspect.Signature:  # what notebooks and `help` show
        return inspect.signature(_function())


def _function() -> Callable[..., Any]:
    function: Callable[..., Any] = importlib.import_module("caltech_hpo.results.library").search
    return function


sys.modules[__name__].__class__ = _CallableRoom
