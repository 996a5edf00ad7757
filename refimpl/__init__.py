"""Baichuan2 in NumPy: the model as a reference to read and to check a device against."""

from typing import TYPE_CHECKING, Any

from refimpl.version import __version__

if TYPE_CHECKING:
    from refimpl.errors import InputError
    from refimpl.model import Model, load
    from refimpl.trace import Trace

__all__ = ["InputError", "Model", "Trace", "__version__", "load"]


def __getattr__(name: str) -> Any:
    """What is named above, imported when it is first used: until then the command line can answer at once."""
    homes = {"InputError": "errors", "Model": "model", "load": "model", "Trace": "trace"}
    if name not in homes:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = globals()[name] = getattr(import_module(f"{__name__}.{homes[name]}"), name)
    return value
