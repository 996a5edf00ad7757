"""The version of this distribution, where modules can read it without importing all of `refimpl`."""

__version__ = "0.1.0"
