"""ONNX graphs of a model, emitted from the one forward, and their verification against the oracle."""

from export.bisect import bisect
from export.device import read_device
from export.emit import Parts, emit
from export.probe import probed
from export.trial import judge
from export.verify import verify

__all__ = ["Parts", "bisect", "emit", "judge", "probed", "read_device", "verify"]
