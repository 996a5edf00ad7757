"""One graph of an export, built again with probes or cut off at them, to find where it goes wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from export.files.encodings import read_encodings
from export.folder.arrays import read_arrays
from export.folder.manifest import quantization, read_manifest
from export.folder.save import Parts
from export.graphs.profiles import profile_named
from export.graphs.runs import build
from refimpl.errors import InputError
from refimpl.files import read_json
from refimpl.grids.encodings import near
from refimpl.model import Model


def probed(folder: str | Path, model: Model, graph: str, probe: str | Sequence[str], until: bool = False) -> Parts:
    """The graph of that name in the export `folder` of `model`, with the taps that the globs `probe` match as outputs.

    They come after its own outputs. With `until` they are its only outputs, and what they do not need is left out,
    inputs too. Golden inputs are those of the export, and golden outputs are computed from them: no other graph is
    built or run. `save` writes it as an export of one graph, which `verify` and `read_device` take.

    Raises InputError for a folder that is not an export of this model, a graph that is not in it, and taps that the
    graph does not compute or cannot show.
    """
    folder = Path(folder)
    plan, _ = read_manifest(folder, weights=False)
    specs = {spec.name: spec for run in plan.runs for spec in run}
    if graph not in specs:
        raise InputError(f"there is no graph {graph!a:.99} in {folder}{near(graph, set(specs))}")
    theirs, ours = asdict(plan.config), asdict(model.config)
    if other := [key for key in ours if theirs[key] != ours[key]]:
        said = f"its {other[0]} is {theirs[other[0]]!r:.40}, the model's {ours[other[0]]!r:.40}"
        raise InputError(f"{folder} is an export of another model: {said}")
    plan = replace(plan, only=graph, probe=()).probing([probe] if isinstance(probe, str) else probe)
    if until and not plan.probe:
        raise InputError("nothing says where the graph ends; give a tap, such as 'model.layers.0.self_attn.scores'")
    ((spec,),) = (plan := replace(plan, until=until)).runs
    inputs = read_arrays(folder, specs[graph], "input", specs[graph].inputs)
    manifest = read_json(folder / "manifest.json")
    try:
        words = {key: manifest["onnx"][key] for key in ("opset", "ir_version", "weights", "on_grids")}
        words["coded"] = bool(manifest["onnx"].get("coded"))  # an older manifest does not say it
        row = replace(profile_named(plan.profile), forms=frozenset(manifest["onnx"]["forms"]), **words)
        golden, quantized = manifest["golden"], manifest["quantization"]
        prompt, simulated = golden["prompt"], golden["simulated"]
    except (KeyError, TypeError) as error:
        raise InputError(f"{folder / 'manifest.json'} is damaged: {error}; export again") from None
    if quantized != quantization(model):
        raise InputError(f"{folder} is an export of other weights: quantize the model as it was for the export")
    encodings = read_encodings(folder / "encodings.json", model) if simulated else None
    built = {graph: build(model, spec, row, encodings)}
    given = {graph: {value.name: inputs[value.name] for value in spec.inputs}}
    return Parts(model, plan, prompt, built, row, encodings, given=given)
