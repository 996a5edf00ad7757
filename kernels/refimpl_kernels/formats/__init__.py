"""Number formats of weights: a file for each format, one table of them all, and the search for better scales."""

from refimpl_kernels.formats.table import (
    FORMATS,
    NESTED,
    TABLES,
    AddedError,
    Blocks,
    dequantize,
    error_between,
    format_named,
    from_arrays,
    layout,
    nest,
    place,
    quantize,
    tile_rows,
    transcode,
)

__all__ = [
    "FORMATS", "NESTED", "TABLES", "AddedError", "Blocks", "dequantize", "error_between", "format_named", "from_arrays",
    "layout", "nest", "place", "quantize", "tile_rows", "transcode",
]  # fmt: skip
