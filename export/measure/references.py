"""What a device's tensors are held against: the float oracle, and what quantization makes of it.

A device may be right in several ways (`kinds.py`), and a verdict needs the one that this device computes in.

- simulation - float is what quantization costs;
- device - simulation is what the compiler or the device did;
- simulation - weights is what the rounding of activations adds, and so how far two right devices may be apart.

Rounding the weights moves the device and the simulation alike, so it excuses nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from export.files.encodings import read_encodings
from export.folder.arrays import as_trace, read_arrays
from export.folder.manifest import quantization, read_manifest, read_scores
from export.folder.verify import run_graph
from export.graphs.plan import Arrays, GraphSpec
from export.graphs.runs import simulate_graph
from export.measure.kinds import ENDS, EVEN, FLOAT, SIMULATION, WEIGHTS, Kind
from export.measure.places import Dataflow
from export.run.engines import Engine
from golden.compare import compare
from refimpl.checkpoint.resolve import model_shapes
from refimpl.config import Config
from refimpl.errors import InputError
from refimpl.files import read_json
from refimpl.grids.encodings import EMBED, Encodings, grid_of
from refimpl.grids.simulate import on_grid
from refimpl.model import Model, SimulatedModel
from refimpl.names import taps
from refimpl.trace import Tap, feeding, silent
from refimpl_kernels.affine import Encoding
from refimpl_kernels.ops import NumPyOps


def shapes_of(folder: Path, config: Config | None = None) -> Model:
    """A stand-in for an export's model, enough to read encodings by: its config, and the shapes of its parameters."""
    config = config or read_manifest(folder, weights=False)[0].config
    weights = {name: SimpleNamespace(shape=shape) for name, shape in model_shapes(config).items()}
    return cast(Model, SimpleNamespace(config=config, weights=weights))


def as_exported(model: Model, folder: Path, config: Config) -> Model:
    """A model, cut to the layers and quantized to the blocks that the export's manifest states.

    A model that is already quantized is not changed. Raises InputError for blocks that the model cannot have.
    """
    if model.config.num_hidden_layers > config.num_hidden_layers:
        model = model.truncated(config.num_hidden_layers)
    blocks = read_json(folder / "manifest.json").get("quantization")
    if not blocks or quantization(model):
        return model
    if not isinstance(blocks, dict):
        raise InputError(f"{folder / 'manifest.json'} is damaged: its quantization is not an object; export again")
    return model.quantize({name.removesuffix(".weight"): scheme for name, scheme in blocks.items()})


def grids_of(encodings: Encodings, config: Config) -> dict[str, Any]:
    """Tap -> the grid that its values stand on; an embedding's values stand on the grid of its table.

    v_proj without a grid of its own has the grid of `value`, because its numbers only move to there.
    """
    grids = {name: grid_of(encodings, config, name) for name in taps(config)}
    for name in [name for name in grids if name.endswith("v_proj")]:
        grids[name] = grids[name] or grids[name.replace("v_proj", "value")]
    grids["model.embed_tokens"] = encodings.parameters.get(EMBED)
    return {name: grid for name, grid in grids.items() if grid is not None}


@dataclass(frozen=True, eq=False)
class References:
    """The references of one export: its goldens, and with a model and encodings what quantization makes of them.

    `model`: what was exported, or the same model before it was cut or quantized to blocks. Without it, the simulation
    is the one that the export has stored, and the graphs themselves compute the answers to other inputs, in `engine`.
    `encodings`: by default those that the export has stored.
    Raises InputError for a model or encodings that are not the export's.
    """

    folder: Path
    model: Model | None = None
    encodings: Encodings | None = None
    engine: str = "auto"

    def __post_init__(self) -> None:
        if self.model is not None:
            object.__setattr__(self, "model", as_exported(self.model, self.folder, self.plan.config))
            if replace(self.model.config, quantized=self.plan.config.quantized) != self.plan.config:
                raise InputError(f"{self.folder} was exported from another model than {self.model}; give that one")
        if self.encodings is None and (self.folder / "encodings.json").is_file():
            shaped = shapes_of(self.folder, self.plan.config)
            object.__setattr__(self, "encodings", read_encodings(self.folder / "encodings.json", shaped))
        if self.encodings is not None and self.model is not None:
            self.encodings.check(self.model.config, self.model.weights)
        if self.model is not None:
            self.expect_same_model()

    @cached_property
    def _manifest(self):
        return read_manifest(self.folder, weights=False)

    @property
    def plan(self):
        return self._manifest[0]

    @property
    def limits(self):
        """Tap -> the tolerance of a float run."""
        return self._manifest[1]

    @cached_property
    def scores(self) -> dict[str, float]:
        """Tap -> the largest attention score of a layer in the golden run."""
        return read_scores(self.folder)

    @cached_property
    def specs(self) -> dict[str, GraphSpec]:
        return {spec.name: spec for run in self.plan.runs for spec in run}

    @cached_property
    def grids(self) -> dict[str, Encoding]:
        """Tap -> its grid, where there are encodings."""
        found = grids_of(self.encodings, self.plan.config) if self.encodings else {}
        return {name: grid for name, grid in found.items() if isinstance(grid, Encoding)}

    @property
    def kinds(self) -> list[Kind]:
        """The kinds that a device may be of, likeliest first."""
        if not self.encodings:
            return [FLOAT]
        if self.model is None:
            return [SIMULATION, FLOAT, ENDS] if self.simulated else [FLOAT, ENDS]
        return [SIMULATION, FLOAT, ENDS, EVEN]

    def inputs(self, spec: GraphSpec) -> Arrays:
        """Golden inputs."""
        return read_arrays(self.folder, spec, "input", spec.inputs)

    @cached_property
    def simulated(self) -> bool:
        """Whether the export has stored the outputs of a simulated device."""
        return bool((read_json(self.folder / "manifest.json").get("golden") or {}).get("simulated"))

    @cached_property
    def rounding(self) -> bool:
        """Whether the export's graphs round by themselves: then they do not tell what floats would give."""
        return bool((read_json(self.folder / "manifest.json").get("onnx") or {}).get("on_grids"))

    def stored(self, spec: GraphSpec, way: str) -> Arrays:
        """The stored outputs of the simulated device, from golden inputs or, chained, from its own earlier outputs."""
        return read_arrays(self.folder, spec, "simulated_chained" if way == "chained" else "simulated", spec.outputs)

    def golden(self, spec: GraphSpec) -> Arrays:
        """Golden outputs."""
        return read_arrays(self.folder, spec, "output", spec.outputs)

    def run(
        self, kind: Kind, spec: GraphSpec, inputs: Mapping[str, np.ndarray],
        feed: Mapping[str, np.ndarray] | None = None, wanted: Collection[str] = (), change: Tap = silent,
    ) -> Arrays:  # fmt: skip
        """The answer of a kind of device to these inputs: float32, the outputs by name and the `wanted` taps.

        `feed`: tap -> the values that the run goes on with, after its own were recorded. `change` is applied to each
        tap before it is recorded.
        """
        seen, shown = Arrays(), {value.tap or value.name: value for value in spec.outputs}
        record = {*wanted, *(shown if feed else ())}

        def tap(name: str, x: Any) -> Any:
            x = change(name, x)
            if name in record:
                seen[name] = x
            return feeding(feed)(name, x) if feed else x

        if kind.on_grids:
            outputs = simulate_graph(self._simulated(kind), spec, inputs, tap)
        else:
            if kind == ENDS:
                inputs = {v.name: self._on_grid(v.tap or v.source or v.name, inputs[v.name]) for v in spec.inputs}
            outputs = self._computed(spec, inputs, tap, wanted)
        for name in record & shown.keys():  # the values that were computed, not those that replaced them
            axes = shown[name].tap_axes
            outputs[shown[name].name] = seen.pop(name).transpose(np.argsort(axes)) if axes else seen.pop(name)
        if kind == ENDS:
            outputs |= {v.name: self._on_grid(v.tap or v.name, outputs[v.name]) for v in spec.outputs}
        return {name: np.ascontiguousarray(x, np.float32) for name, x in {**outputs, **seen}.items()}

    def _computed(
        self, spec: GraphSpec, inputs: Mapping[str, np.ndarray], tap: Tap = silent, wanted: Collection[str] = ()
    ) -> Arrays:
        """The graph's outputs in floats, computed by the model or, without one, by the graph itself."""
        if self.model is None:
            inside = set(wanted) - {value.tap for value in spec.outputs}
            if inside:
                return self._shown(spec, inputs, inside)
            (outputs,) = run_graph(Engine(self.engine), self.folder, spec, [dict(inputs)])
            return outputs
        wide = NumPyOps("float64")
        return spec.computed(self.model.weights, wide, spec.filled(inputs), feeding(inputs, then=tap))

    def _shown(self, spec: GraphSpec, inputs: Mapping[str, np.ndarray], wanted: Collection[str]) -> Arrays:
        """The outputs that the graph itself computes, and taps inside it."""
        flow = Dataflow(self.folder / spec.name, spec)
        with TemporaryDirectory(prefix=".shown-", dir=self.folder) as folder:
            (given,) = Engine(self.engine).run(flow.save(Path(folder), wanted), [dict(inputs)])
        shown = {name: flow.places[name].array(given) for name in wanted if name in flow.places}
        return {v.name: given[v.name] for v in spec.outputs} | {n: x for n, x in shown.items() if x is not None}

    def _on_grid(self, name: str, x: np.ndarray) -> np.ndarray:
        grid = self._ends.get(name)
        return x if grid is None or x.dtype.kind != "f" else on_grid(x.astype(np.float32, copy=False), grid, "away")

    @cached_property
    def _ends(self) -> dict[str, Any]:
        """Grids by the names of taps, of the cache, and of what the host computes."""
        found: dict[str, Any] = {**(self.encodings.activations if self.encodings else {}), **self.grids}
        for spec in self.specs.values():
            found |= {value.name: self.grids[value.tap] for value in spec.outputs if value.tap in self.grids}
        return found

    def parameters(self, kind: Kind) -> Mapping[str, Any]:
        """The model's parameters as a kind of device has them."""
        model = self._simulated(kind) if kind.on_grids else self.model
        return model.weights if model is not None else {}

    def _simulated(self, kind: Kind) -> SimulatedModel:
        if self.model is None or self.encodings is None:
            raise InputError("a simulation needs the model and its encodings; give both")
        if kind not in self._models:
            only_weights = Encodings({}, self.encodings.parameters)
            encodings = only_weights if kind == WEIGHTS else self.encodings
            self._models[kind] = SimulatedModel(self.model, encodings, kind.rounding or "away")
        return self._models[kind]

    @cached_property
    def _models(self) -> dict[Kind, SimulatedModel]:
        return {}

    def expect_same_model(self) -> None:
        """Raises InputError if the model does not compute the goldens, on the smallest of its graphs with a layer."""
        spec = min(self.specs.values(), key=lambda spec: (not spec.part.layers, spec.tokens, len(spec.part.layers)))
        found = compare(as_trace(spec, self.run(FLOAT, spec, self.inputs(spec))), as_trace(spec, self.golden(spec)),
                        self.limits)  # fmt: skip
        if not found:
            raise InputError(f"{self.model} does not compute the goldens of {self.folder}; give the model it is of, "
                             "or the folder that was quantized for it")  # fmt: skip
