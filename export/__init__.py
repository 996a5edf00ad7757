"""ONNX graphs of a model, emitted from the one forward, and their verification against the oracle."""

from export.folder.emit import emit
from export.folder.probe import probed
from export.folder.save import Parts
from export.folder.verify import verify
from export.measure.device import read_device
from export.search.bisection import bisect
from export.verdict.trial import judge

__all__ = ["Parts", "bisect", "emit", "judge", "probed", "read_device", "verify"]
