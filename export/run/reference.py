"""ONNX's own evaluator, with the one operator of ours that it lacks: onnxruntime's MatMulNBits, as it is documented.

**Source**: onnxruntime docs/ContribOperators.md, com.microsoft.MatMulNBits.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from export.graphs.ops import MICROSOFT
from refimpl_kernels.formats import matmulnbits


class MatMulNBits(OpRun):
    """A (…, K) times the transpose of a matrix (N, K) in blocks of 4 bits."""

    op_domain = MICROSOFT

    def _run(self, A, B, scales, zero_points=None, K=None, N=None, bits=4, block_size=32, accuracy_level=0):
        parts = matmulnbits.from_tensors(B, scales.reshape(N, -1), zero_points)
        codes = matmulnbits.unpack(parts.pop("packed"), B.shape[1] * block_size).reshape(N, -1, block_size)
        weight = matmulnbits.dequantize(codes, **{name: part[..., None] for name, part in parts.items()})
        return (np.matmul(A, weight.reshape(N, -1)[:, :K].T),)


def reference_evaluator(path: Path) -> ReferenceEvaluator:
    """The evaluator of the graph in a file."""
    return ReferenceEvaluator(str(path), new_ops=[MatMulNBits])
