"""The manifest of an export: the list of its files, and what they are. One file writes the format and reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from tqdm import tqdm

import refimpl
from export.graphs.plan import GraphSpec, Plan
from export.graphs.profiles import Profile
from golden.bundle import sha256
from golden.tolerance import LARGEST, Tolerance, tolerances
from refimpl.blocks.quantize import QuantizedWeight
from refimpl.config import Config
from refimpl.errors import InputError
from refimpl.files import read_json, settle
from refimpl.model import Model
from refimpl.names import taps

FORMAT = "refimpl export 1"
TEST_DATA = "test_data/{}/test_data_set_0"  # beside the graphs' folders: AI Hub takes nothing else in those
BESIDE = ("hub.jsonl", "bisect.jsonl", "outputs")  # what `hub` and `bisect` keep there; the next export may use it


def contents(
    model: Model, plan: Plan, profile: Profile, golden: Mapping[str, Any] | None, files: Mapping[str, Any]
) -> dict[str, Any]:
    """What `manifest.json` holds. `golden`: facts about the goldens, if there are any; `files`: size and sha256."""
    specs = [spec for run in plan.runs for spec in run]
    limits = _limits(plan, golden["scores"] if golden else {})
    return {
        "format": FORMAT,
        "versions": {"refimpl": refimpl.__version__, "onnx": onnx.__version__, "numpy": np.__version__},
        "config": asdict(model.config),
        "plan": {field.name: getattr(plan, field.name) for field in fields(plan) if field.name != "config"},
        "onnx": {"opset": profile.opset, "ir_version": profile.ir_version, "forms": sorted(profile.forms),
                 "weights": profile.weights, "on_grids": profile.on_grids, "coded": profile.coded},
        "quantization": quantization(model),
        "golden": golden or False,
        "tolerances": {name: asdict(limit) for name, limit in limits.items()},
        "graphs": {
            spec.name: {
                "real_tokens": spec.real, "past_tokens": spec.past,
                "inputs": [asdict(v) for v in spec.inputs], "outputs": [asdict(v) for v in spec.outputs],
            }
            for spec in specs
        },
        "files": files,
    }  # fmt: skip


def _limits(plan: Plan, scores: Mapping[str, float]) -> dict[str, Tolerance]:
    """Output's tap -> how far float32 may be from the golden.

    Only tokens that are not padding count for positions and sums: masked places add exactly nothing.
    """
    tokens = max(spec.real + spec.past for run in plan.runs for spec in run)
    limits: dict[str, Tolerance] = {}
    for spec in plan.runs[0]:  # a graph alone begins with the golden's tensors, and inherits no error from before
        fed = set(taps(plan.config)).difference(spec.taps) if spec.cut else False
        rules = tolerances(plan.config, "float32", tokens, fed, scores)
        limits |= {value.tap: rules[value.tap] for value in spec.outputs if value.tap}
    return limits


def quantization(model: Model) -> dict[str, dict[str, Any]]:
    """The format of each weight that is quantized."""
    return {
        name: {"format": weight.blocks.format, "block_size": weight.blocks.block_size}
        for name, weight in model.weights.items()
        if isinstance(weight, QuantizedWeight)
    }


def read_manifest(folder: Path, weights: bool = True) -> tuple[Plan, dict[str, Tolerance]]:
    """The plan and the tolerances of an export, once each of its files has the size and sha256 of the manifest.

    Without `weights` only the goldens are checked. Raises InputError for a manifest that is damaged, of another
    version, or at odds with itself, and for a file that is missing or has changed.
    """
    settle(folder, BESIDE)
    path = folder / "manifest.json"
    manifest = read_json(path)
    if manifest.get("format") != FORMAT:
        raise InputError(f"{path} has the format {manifest.get('format')!r}, expected {FORMAT!r}; export again")
    if manifest.get("golden") is False:
        raise InputError(f"{folder} was exported without goldens, so nothing can be verified; export with them")
    try:
        plan = _plan(manifest)
        limits = _stated_limits(manifest, plan)
        files = _stated_files(manifest, plan)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path} is damaged: {type(error).__name__} {error}; export again") from None
    files = {name: of for name, of in files.items() if weights or name.startswith("test_data/")}
    for name, (size, digest) in tqdm(files.items(), "reading", unit="file", disable=None, leave=False):
        file = folder / name
        if not file.is_file() or file.stat().st_size != size or sha256(file) != digest:
            raise InputError(f"{file} is not the file of {size} bytes that was exported; export again")
    return plan, limits


def _plan(manifest: Mapping[str, Any]) -> Plan:
    """The plan. It is not built if it has more graphs than files: its size is bounded by that of the manifest."""
    stated, config = manifest["plan"], Config(**manifest["config"])
    alone = stated.get("modules") or stated.get("only")
    graphs = len(stated["modules"]) if stated.get("modules") else 1 if alone else config.num_hidden_layers
    if graphs * len(stated["tokens"]) > len(manifest["files"]):
        raise ValueError("it describes more layers than there are files for")
    words: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in stated.items()}
    return Plan(config, **words)


def _stated_limits(manifest: Mapping[str, Any], plan: Plan) -> dict[str, Tolerance]:
    values = [value for run in plan.runs for spec in run for value in spec.outputs if value.tap]
    limits = {str(value.tap): Tolerance(**manifest["tolerances"][value.tap]) for value in values}
    if not all(isinstance(limit.relative, float) and 0 <= limit.relative <= LARGEST for limit in limits.values()):
        raise ValueError(f"a tolerance is not a number from 0 to {LARGEST}")
    return limits


def _stated_files(manifest: Mapping[str, Any], plan: Plan) -> dict[str, tuple[int, str]]:
    """Name -> size and sha256, of every file that the plan needs."""
    files, simulated = manifest["files"], manifest["golden"]["simulated"]
    specs = [spec for run in plan.runs for spec in run]
    names = [name for spec in specs for name in file_names(spec, simulated, plan.chained)]
    return {name: (files[name]["bytes"], files[name]["sha256"]) for name in names}


def read_scores(folder: Path) -> dict[str, float]:
    """Tap -> the largest attention score of a layer in the golden run of an export; {} if that was not recorded.

    Raises InputError for a value that cannot be a score.
    """
    path = folder / "manifest.json"
    found = (read_json(path).get("golden") or {}).get("scores", {})
    if not isinstance(found, dict) or not all(type(x) is float and 0 <= x < 2.0**128 for x in found.values()):
        raise InputError(f"{path} is damaged: the sizes of scores are {found!s:.60}; export again")
    return found


def file_names(spec: GraphSpec, simulated: bool, chained: bool = True) -> list[str]:
    """The files of a graph, relative to the export."""
    names = [f"{spec.name}/model.onnx", f"{spec.name}/model.data"]
    kinds = [("input", spec.inputs), ("output", spec.outputs)]
    if simulated:
        kinds += [("simulated", spec.outputs), *[("simulated_chained", spec.outputs)] * chained]
    for kind, values in kinds:
        names += [f"{TEST_DATA.format(spec.name)}/{kind}_{i}.pb" for i in range(len(values))]
    return names
