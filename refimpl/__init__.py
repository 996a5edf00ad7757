"""Baichuan2 in NumPy: the model as a reference to read and to check a device against."""

from refimpl.errors import InputError
from refimpl.model import Model, load
from refimpl.trace import Trace
from refimpl.version import __version__

__all__ = ["InputError", "Model", "Trace", "__version__", "load"]
