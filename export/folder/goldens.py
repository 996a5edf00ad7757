"""The golden inputs and outputs of an export's graphs, computed run by run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle, islice

import numpy as np

from export.graphs.part import Part
from export.graphs.plan import Arrays, GraphSpec, Plan, carry, host_inputs
from export.graphs.runs import oracle, simulate_graph
from golden.tolerance import largest_scores
from refimpl.errors import InputError
from refimpl.model import Model, SimulatedModel
from refimpl.trace import Tap
from refimpl_kernels.ops import NumPyOps

PROMPT = "登鹳雀楼->王之涣\n夜雨寄北->"  # from the model card of Baichuan2-7B-Base


def golden_prompt(model: Model, room: int) -> list[int]:
    """The first tokens of a line of the model card, three quarters of `room`; random ids if there is no tokenizer."""
    try:
        ids = model.token_ids(PROMPT)[0]
    except InputError:
        ids = np.random.default_rng(0).integers(0, model.config.vocab_size, room)
    return ids[: max(1, room * 3 // 4)].tolist()


@dataclass
class Goldens:
    """Iterates over each graph and its golden arrays by kind: "input", "output", and with a simulation two more.

    The first run reads the prompt. Each other run goes on from its keys and values, with the likeliest next token, and
    after it, if the run takes more tokens, the prompt again. Outputs are what NumPy computes in float64 from the stored
    inputs, rounded to float32; the next part reads these. A graph that is a module alone reads what the whole model
    computes for the module's inputs.

    `simulation`: the quantized device. It adds "simulated", its outputs for the golden inputs, and "simulated_chained",
    its outputs for what it gave before. `given`: the inputs of each graph, if they are known. `scores` holds, once the
    iteration is over, the largest attention score of each layer.
    """

    model: Model
    plan: Plan
    prompt: list[int]
    simulation: SimulatedModel | None = None
    given: Mapping[str, Arrays] | None = None
    scores: dict[str, float] = field(default_factory=dict)

    def __iter__(self) -> Iterator[tuple[GraphSpec, dict[str, Arrays]]]:
        after_prompt, after_simulated = Arrays(), Arrays()
        for run in self.plan.runs:
            so_far, simulated = Arrays(after_prompt), Arrays(after_simulated)
            ids = self._ids(run[0], after_prompt)
            if self.plan.modules:
                so_far |= around_graphs(self.model, run, ids, so_far)
            for spec in run:
                case = self._case(spec, ids, so_far, simulated)
                so_far |= case["output"]
                simulated |= case.get("simulated_chained", {})
                yield spec, case
            after_prompt, after_simulated = after_prompt or so_far, after_simulated or simulated

    def _ids(self, spec: GraphSpec, after_prompt: Arrays) -> list[int]:
        """The ids of a run: the prompt; or, after it, as many of the following ids as fit."""
        if not after_prompt:
            return self.prompt
        likeliest = [int(after_prompt["logits"][0, -1].argmax())] if "logits" in after_prompt else []
        return list(islice(cycle([*likeliest, *self.prompt]), spec.tokens))

    def _case(self, spec: GraphSpec, ids: Sequence[int], so_far: Arrays, simulated: Arrays) -> dict[str, Arrays]:
        """The golden arrays of one graph. `so_far`, `simulated`: what the graphs before it gave."""
        host = {} if self.given else host_inputs(self.model, spec, ids)
        inputs = self.given[spec.name] if self.given else fed(spec, host, so_far)
        case = {"input": inputs, "output": oracle(self.model, spec, inputs, measuring(spec, self.scores))}
        if self.simulation:
            case["simulated"] = simulate_graph(self.simulation, spec, inputs)
            if self.plan.chained:
                case["simulated_chained"] = simulate_graph(self.simulation, spec, fed(spec, host, simulated))
        return case


def fed(spec: GraphSpec, host: Arrays, outputs: Arrays) -> Arrays:
    """The inputs of a graph: what the host computes, and what continues outputs of other graphs."""
    return {v.name: carry(spec, v, outputs) if v.source else host[v.name] for v in spec.inputs}


def measuring(spec: GraphSpec, scores: dict[str, float]) -> Tap:
    """The tap that records the largest attention score of each layer that a graph computes, padding left out."""

    def tap(name: str, x: np.ndarray) -> np.ndarray:
        if name.endswith(".scores") and name in spec.taps:
            (size,) = largest_scores({name: x[..., -spec.real :, :]}).values()
            scores[name] = max(size, scores.get(name, 0.0))
        return x

    return tap


def around_graphs(model: Model, run: Sequence[GraphSpec], ids: Sequence[int], so_far: Arrays) -> Arrays:
    """The tensors that modules alone read, by tap. The model goes on from `so_far`, and stops after the last module."""
    stop, heads = max(spec.part.layers.stop for spec in run), any(spec.part.heads for spec in run)
    before = replace(run[0].whole, part=Part(1, 1, range(stop), embeds=True, heads=heads))
    read = {value.name for spec in run for value in spec.inputs if value.tap}
    found: dict[str, np.ndarray] = {}

    def tap(name: str, x: np.ndarray) -> np.ndarray:
        if name in read:
            found[name] = x.astype(np.float32)
        return x

    inputs = fed(before, host_inputs(model, before, ids), so_far)
    found |= before.computed(model.weights, NumPyOps("float64"), inputs, tap)
    return {name: x.astype(np.float32, copy=False) for name, x in found.items()}
