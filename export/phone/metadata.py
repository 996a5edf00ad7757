"""What a bundle says about its graphs: `metadata.json` as AI Hub Models and GenieX read it, and the older YAML.

    metadata.json   model_files: graph -> inputs, outputs -> shape, dtype, quantization_parameters (scale, zero_point)
    metadata.yaml   components: the same with scale and offset, where real = (code + offset) * scale

GenieX takes from it the sizes of the model: it knows graphs by names such as `token_ar1_cl4096_2_of_5`, and reads
shapes of the cache, of the hidden state and of logits.

**Source**: AI Hub Models 0.65, `configs/model_metadata.py` and `tensor_spec.py`; GenieX, `llm_spec_loader.cpp`; of the
YAML, AI Hub Models 0.46, `_shared/llm/model.py`.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from export.files.graph_folder import CACHE, GraphFolder
from export.files.skeleton import ValueInfo
from export.graphs.borders import Border, read_borders

DTYPES = {1: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64", 10: "float16"}
CODE_BITS = {2: 8, 3: 8, 4: 16, 5: 16, 21: 4, 22: 4}  # of ONNX's types for codes


def as_metadata(parts: Sequence[GraphFolder], name: str, chat: Mapping[str, str], versions: Mapping[str, str]) -> dict:
    """The content of `metadata.json`. `chat`: the texts around the words of each role; `versions`: of the tools."""
    contexts = sorted({part.called.context for part in parts if part.called})
    return {
        "model_id": name.lower().replace("-", "_"),
        "model_name": name,
        "runtime": "genie",
        "precision": _precision(parts),
        "tool_versions": dict(versions),
        "model_files": _files(parts, "zero_point"),
        "supplementary_files": {
            "genie_config.json": "configuration for genie-t2t-run",
            "text-generator.json": "the same for a pipeline of genie-app",
            "htp_backend_ext_config.json": "the NPU",
            "tokenizer.json": "tokenizer",
            "sample_prompt.txt": "a prompt in the model's own layout",
        },
        "genie": {
            "chat_template": dict(chat),
            "context_lengths": contexts,
            "supports_streaming": True,
            "pipeline": {"nodes": {"textGenerator": "text-generator.json"}, "connections": []},
            "sample_inputs": [
                {
                    "node": "textGenerator",
                    "node_io": "GENIE_NODE_TEXT_GENERATOR_TEXT_INPUT",
                    "file": "sample_prompt.txt",
                }
            ],
        },
    }


def described(parts: Sequence[GraphFolder]) -> dict[str, Any]:
    """The content of `metadata.yaml`: real = (code + offset) * scale."""
    return {"precision": _precision(parts), "runtime": "genie", "components": _files(parts, "offset")}


def _files(parts: Sequence[GraphFolder], zero: str) -> dict[str, Any]:
    """Each graph's inputs and outputs. `zero`: "offset" or "zero_point", which is minus the offset."""
    found = {}
    for part in parts:
        borders = read_borders(part.of_kind(".onnx")[0]) if part.grids is None else {}

        def tensors(values: Sequence[ValueInfo], part=part, borders=borders) -> dict[str, Any]:
            return {value.name: _described(part, value, borders.get(value.name), zero) for value in values}

        found[part.name] = {"inputs": tensors(part.graph.inputs), "outputs": tensors(part.graph.outputs)}
    return found


def _described(part: GraphFolder, value: ValueInfo, border: Border | None, zero: str) -> dict[str, Any]:
    """Shape, dtype and grid of a tensor, by the graph's own border or else by its encodings."""
    grid, dtype = part.standing.get(value.name), DTYPES.get(value.dtype, str(value.dtype))
    said: dict[str, Any] = {"shape": list(value.shape or ()), "dtype": dtype}
    scale, zero_point = None, 0
    if border is not None:
        said["dtype"], scale, zero_point = f"uint{border.bits}", border.scale, border.zero_point
    elif grid is not None and dtype == "float32":
        said["dtype"] = f"float{grid.bits}" if grid.floating else "uint8" if grid.bits <= 8 else "uint16"
        scale, zero_point = grid.scale, -int(grid.offset or 0)
    if scale is not None:
        said["quantization_parameters"] = {"scale": scale, zero: -zero_point if zero == "offset" else zero_point}
    return said


def _precision(parts: Sequence[GraphFolder]) -> str:
    """Bits of most weights and of most activations, such as w4a16."""
    weights: Counter[int] = Counter()
    activations: Counter[int] = Counter()
    for part in parts:
        for tensor in part.constants.values():
            grid = (part.grids or {}).get(tensor.name)
            if len(tensor.dims) > 1 and (grid or tensor.dtype in CODE_BITS):
                weights[grid.bits if grid else CODE_BITS[tensor.dtype]] += math.prod(tensor.dims)
        for value in part.ends:
            if not CACHE.fullmatch(value.name) and (bits := _bits(part, value)):
                activations[bits] += 1
    if not weights or not activations:
        return "float"
    return f"w{weights.most_common(1)[0][0]}a{activations.most_common(1)[0][0]}"


def _bits(part: GraphFolder, value: ValueInfo) -> int:
    grid = part.standing.get(value.name)
    return grid.bits if grid else {2: 8, 4: 16}.get(value.dtype, 0)


def as_yaml(content: Mapping[str, Any], indent: int = 0) -> str:
    """A mapping of mappings, lists of numbers, numbers and texts as YAML, which every reader takes alike."""
    lines = []
    for key, value in content.items():
        start = f"{'  ' * indent}{_scalar(key)}:"
        if isinstance(value, Mapping):
            lines.append(f"{start}\n{as_yaml(value, indent + 1)}" if value else f"{start} {{}}\n")
        elif isinstance(value, list):
            lines.append(f"{start} [{', '.join(map(_scalar, value))}]\n")
        else:
            lines.append(f"{start} {_scalar(value)}\n")
    return "".join(lines)


def _scalar(value: Any) -> str:
    if isinstance(value, float):  # YAML 1.1 takes 1e-05 for a text
        text = repr(value)
        return text if "." in text else text.replace("e", ".0e")
    words = ("y", "n", "yes", "no", "on", "off", "true", "false", "null")  # which YAML does not read as texts
    plain = isinstance(value, str) and re.fullmatch(r"[A-Za-z_/][A-Za-z0-9_./-]*", value) and value.lower() not in words
    return value if plain else json.dumps(value)
