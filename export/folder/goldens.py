"""The golden inputs and outputs of an export's graphs, run by run, as they are computed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import cycle, islice

import numpy as np

from export.graphs.plan import Arrays, GraphSpec, Part, Plan, carry, host_inputs
from export.graphs.runs import oracle, simulate_graph
from golden.tolerance import largest_scores
from refimpl.errors import InputError
from refimpl.model import Model, SimulatedModel
from refimpl.trace import Tap
from refimpl_kernels.ops import NumPyOps

PROMPT = "登鹳雀楼->王之涣\n夜雨寄北->"  # from the model card of Baichuan2-7B-Base


def golden_prompt(model: Model, room: int) -> list[int]:
    """A line of the model card, or random ids for want of a tokenizer, in three quarters of the room."""
    try:
        ids = model.token_ids(PROMPT)[0]
    except InputError:
        ids = np.random.default_rng(0).integers(0, model.config.vocab_size, room)
    return ids[: max(1, room * 3 // 4)].tolist()


def goldens(
    model: Model, plan: Plan, prompt: list[int], simulation: SimulatedModel | None = None,
    given: Mapping[str, Arrays] | None = None, scores: dict[str, float] | None = None,
) -> Iterator[tuple[GraphSpec, dict[str, Arrays]]]:  # fmt: skip
    """Each graph with its golden "input" and "output", run by run: the first reads the prompt, each other goes on.

    It goes on with the likeliest token, and then, where more are asked for, with the prompt again. Outputs are what
    NumPy computes in float64 from the very inputs, rounded to float32, and the next part is given those. A graph alone
    is given what the model, run up to there, has in its place. `given`: the inputs of a graph, where they are known.
    `scores` learns how large the attention scores of each layer are.

    With a `simulation` of a quantized device there is also what that says: "simulated", of the golden inputs, and
    "simulated_chained", of what it said of the graphs before.
    """
    after_prompt, after_simulated = Arrays(), Arrays()
    for run in plan.runs:
        ids, flow, simulated = prompt, Arrays(after_prompt), Arrays(after_simulated)
        if after_prompt:
            likeliest = [int(flow["logits"][0, -1].argmax())] if "logits" in flow else []
            ids = list(islice(cycle([*likeliest, *prompt]), run[0].tokens))
        if plan.modules:
            flow |= around_graphs(model, run, ids, flow)
        for spec in run:
            host = {} if given else host_inputs(model, spec, ids)

            def linked(flow: Arrays, spec: GraphSpec = spec, host: Arrays = host) -> Arrays:
                return {v.name: carry(spec, v, flow) if v.source else host[v.name] for v in spec.inputs}

            inputs = given[spec.name] if given else linked(flow)
            outputs = oracle(model, spec, inputs, measuring(spec, {} if scores is None else scores))
            case = {"input": inputs, "output": outputs}
            if simulation:
                case["simulated"] = simulate_graph(simulation, spec, inputs)
                if plan.chained:
                    case["simulated_chained"] = simulate_graph(simulation, spec, linked(simulated))
                    simulated |= case["simulated_chained"]
            flow |= outputs
            yield spec, case
        after_prompt, after_simulated = after_prompt or flow, after_simulated or simulated


def measuring(spec: GraphSpec, scores: dict[str, float]) -> Tap:
    """Keeps how large the attention scores are that a graph computes; those of padding do not count."""

    def tap(name: str, x: np.ndarray) -> np.ndarray:
        if name.endswith(".scores") and name in spec.taps:
            (size,) = largest_scores({name: x[..., -spec.real :, :]}).values()
            scores[name] = max(size, scores.get(name, 0.0))
        return x

    return tap


def around_graphs(model: Model, run: Sequence[GraphSpec], ids: Sequence[int], flow: Arrays) -> Arrays:
    """What graphs alone read, from a run of the model up to the last of them, which goes on from the `flow` before."""
    stop, heads = max(spec.part.layers.stop for spec in run), any(spec.part.heads for spec in run)
    before = replace(run[0].whole, part=Part(1, 1, range(stop), embeds=True, heads=heads))
    host, read = host_inputs(model, before, ids), {v.name for spec in run for v in spec.inputs if v.tap}
    inputs = {v.name: carry(before, v, flow) if v.source else host[v.name] for v in before.inputs}
    found: dict[str, np.ndarray] = {}

    def tap(name: str, x: np.ndarray) -> np.ndarray:
        if name in read:
            found[name] = x.astype(np.float32)
        return x

    found |= before.computed(model.weights, NumPyOps("float64"), inputs, tap)
    return {name: x.astype(np.float32, copy=False) for name, x in found.items()}
