"""Truth from PyTorch: making goldens, storing them, and comparing any run with them."""

from golden.bundle import Golden, read, read_trace, write, write_trace
from golden.check import check
from golden.compare import Report, compare
from golden.tolerance import Tolerance, tolerances

__all__ = [
    "Golden", "Report", "Tolerance", "check", "compare", "read", "read_trace", "tolerances", "write", "write_trace",
]  # fmt: skip
