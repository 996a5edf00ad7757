"""The manifest of an export: what its folder consists of. Whoever writes the format reads it, too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tqdm import tqdm

from export.graphs.plan import GraphSpec, Plan
from golden.bundle import sha256
from golden.tolerance import LARGEST, Tolerance
from refimpl.blocks.quantize import QuantizedWeight
from refimpl.config import Config
from refimpl.errors import InputError
from refimpl.files import read_json
from refimpl.model import Model

FORMAT = "refimpl export 1"
TEST_DATA = "test_data/{}/test_data_set_0"  # beside the graphs' folders: AI Hub takes nothing else in those
BESIDE = ("hub.jsonl", "bisect.jsonl", "outputs")  # of `hub` and `bisect` in its folder: the next export may use it


def quantization(model: Model) -> dict[str, dict[str, Any]]:
    """The format of each weight that is quantized."""
    return {
        name: {"format": weight.blocks.format, "block_size": weight.blocks.block_size}
        for name, weight in model.weights.items()
        if isinstance(weight, QuantizedWeight)
    }


def read_manifest(folder: Path, weights: bool = True) -> tuple[Plan, dict[str, Tolerance]]:
    """What an export consists of, after a check that each of its files is there with the bytes that were written.

    Without `weights` only the goldens are checked. Raises InputError for what is no manifest of this version, is
    damaged, or does not describe what it says it does.
    """
    path = folder / "manifest.json"
    manifest = read_json(path)
    if manifest.get("format") != FORMAT:
        raise InputError(f"{path} has the format {manifest.get('format')!r}, expected {FORMAT!r}; export again")
    if manifest.get("golden") is False:
        raise InputError(f"{folder} was exported without goldens, so nothing can be verified; export with them")
    try:
        stated, files = manifest["plan"], manifest["files"]
        config = Config(**manifest["config"])
        alone = stated.get("modules") or stated.get("only")
        graphs = len(stated["modules"]) if stated.get("modules") else 1 if alone else config.num_hidden_layers
        if graphs * len(stated["tokens"]) > len(files):
            raise ValueError("it describes more layers than there are files for")
        words: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in stated.items()}
        plan = Plan(config, **words)
        specs = [spec for run in plan.runs for spec in run]
        simulated = manifest["golden"]["simulated"]
        limits = {v.tap: Tolerance(**manifest["tolerances"][v.tap]) for s in specs for v in s.outputs if v.tap}
        if not all(isinstance(limit.relative, float) and 0 <= limit.relative <= LARGEST for limit in limits.values()):
            raise ValueError(f"a tolerance is no number from 0 to {LARGEST}")
        expected = {
            name: (files[name]["bytes"], files[name]["sha256"])
            for spec in specs
            for name in file_names(spec, simulated, plan.chained)
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path} is damaged: {type(error).__name__} {error}; export again") from None
    expected = {name: of for name, of in expected.items() if weights or name.startswith("test_data/")}
    for name, (size, digest) in tqdm(expected.items(), "reading", unit="file", disable=None, leave=False):
        file = folder / name
        if not file.is_file() or file.stat().st_size != size or sha256(file) != digest:
            raise InputError(f"{file} is not the file of {size} bytes that was exported; export again")
    return plan, limits


def read_scores(folder: Path) -> dict[str, float]:
    """Tap -> the largest attention score of a layer in the golden run of an export; {} if that was not recorded.

    Raises InputError for what cannot be one.
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
