"""Rules about the files of a graph's folder: which there are, whether they can be read, and how large they are."""

from __future__ import annotations

from collections import Counter
from pathlib import PurePosixPath

from export.files.graph_folder import GraphFolder
from export.files.skeleton import BITS
from export.preflight.rule import rule
from refimpl.errors import at_most

PROTOBUF_LIMIT = 1 << 31  # bytes of a protobuf message
BINARY_LIMIT = 2_000_000_000  # bytes of weights in a context binary


@rule(
    "damaged",
    "error",
    wrong="model.onnx ends in the middle of a weight",
    source="protobuf, JSON",
    remedy="export or copy the file again",
)
def damaged(graph: GraphFolder):
    """Every file can be read. Of a graph with a damaged file, nothing else is checked."""
    yield from (("", why) for why in graph.damage)


@rule(
    "folder-extra-files",
    "error",
    wrong="copy.onnx beside model.onnx",
    source="client: _get_model_dir_type",
    remedy="leave one .onnx, one .data, one .encodings, no more",
)
def folder_extra_files(graph: GraphFolder):
    """A folder is uploaded as one model: exactly one .onnx, at most one .data and one .encodings, and nothing else."""
    kinds = Counter(path.suffix for path in graph.files if path.is_file())
    for path in graph.files:
        if path.is_symlink():
            yield path.name, "is a link; an upload takes files"
        elif path.suffix not in (".onnx", ".data", ".encodings") or not path.is_file():
            yield path.name, "does not belong in a graph's folder"
    for suffix in (".onnx", ".data", ".encodings"):
        if kinds[suffix] > 1:
            yield "", f"there are {kinds[suffix]} files *{suffix}, one is taken"


@rule(
    "external-misplaced",
    "error",
    wrong="values in ../weights.bin",
    source="client; ports",
    remedy="save all weights as one file model.data beside model.onnx",
)
def external_misplaced(graph: GraphFolder):
    """Weights outside model.onnx lie in one *.data file of the same folder; values of Constant nodes, too."""
    locations: dict[str, str] = {}
    for tensor in graph.graph.every_tensor():
        if tensor.external is not None:
            locations.setdefault(tensor.external.get("location", ""), tensor.name)
    for location, name in locations.items():
        if not location or "/" in location or "\\" in location or location in (".", "..") or "\0" in location:
            yield name, f"its values are in {location!a:.80}, which is not a file in this folder"
        elif PurePosixPath(location).suffix != ".data":
            yield name, f"its values are in {location!a:.80}, which is not called *.data"
        elif not (graph.folder / location).is_file():
            yield name, f"its values are in {location!a:.80}, which is not there"
    if len(locations) > 1:
        yield "", f"weights lie in {len(locations)} files, one is taken: {at_most(map(ascii, locations))}"


@rule(
    "external-out-of-range",
    "error",
    wrong="a weight that ends at byte 640 of a file of 600",
    source="ONNX: ExternalDataInfo",
    remedy="copy model.data again, or export again",
)
def external_out_of_range(graph: GraphFolder):
    """The bytes of a weight lie within its file, and are as many as its shape needs."""
    sizes: dict[str, int] = {path.name: path.stat().st_size for path in graph.of_kind(".data")}
    for tensor in graph.graph.every_tensor():
        if tensor.external is None or tensor.external.get("location") not in sizes:
            continue
        size, said = sizes[tensor.external["location"]], [tensor.external.get(key) for key in ("offset", "length")]
        if not all(number is None or (number.isascii() and number.isdecimal() and len(number) < 20) for number in said):
            yield tensor.name, "its offset or length is not a number"
            continue
        offset = int(said[0] or 0)
        length = int(said[1]) if said[1] is not None else size - offset
        if length < 0 or offset + length > size:
            yield tensor.name, f"it ends at byte {offset + length} of a file of {size}"
        elif length != tensor.nbytes:
            yield tensor.name, f"it has {length} bytes, its shape needs {tensor.nbytes}"


@rule(
    "protobuf-too-large",
    "error",
    wrong="a model.onnx of 2.3 GB with the weights inside",
    source="protobuf; ai-hub-apps #24",
    remedy="move the weights into model.data, or split into more parts",
)
def protobuf_too_large(graph: GraphFolder):
    """A protobuf message, model.onnx, has less than 2 GiB."""
    for path in graph.of_kind(".onnx"):
        if path.stat().st_size >= PROTOBUF_LIMIT:
            yield "", f"{path.name} has {path.stat().st_size / 1e9:.2f} GB; protobuf's limit is 2 GiB (2.15 GB)"


@rule(
    "binary-too-large",
    "warning",
    wrong="eight layers of a 7B model in 16 bits: 3.2 GB",
    source="zoo: onboarding.md",
    remedy="split the model into more parts, or quantize weights to 4 bits",
)
def binary_too_large(graph: GraphFolder):
    """A context binary has at most 1 to 2 GB of encoded weights, because a process of the NPU has 32-bit addresses."""
    grids, raw, packed = graph.grids or {}, 0, 0
    for tensor in graph.constants.values():
        raw += tensor.nbytes
        bits = BITS.get(tensor.dtype, 8)
        packed += tensor.nbytes * min(bits, grids[tensor.name].bits if tensor.name in grids else bits) // bits
    if packed > BINARY_LIMIT:
        yield (
            "",
            (
                f"its weights have {packed / 1e9:.2f} GB as its encodings pack them ({raw / 1e9:.2f} GB as they are); "
                "the NPU's limit is 1 to 2 GB a binary"
            ),
        )
