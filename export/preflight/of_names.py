"""Rules about names: no two alike once compiled, and those by which Genie finds the parts of a language model.

Names, shapes and order are checked in graphs that look like a part of a language model: they have a `past_key_0_in`, or
are called `prompt_ar128_cl4096_2_of_5`.
"""

from __future__ import annotations

from collections import Counter

from export.files.graph_folder import CACHE, HOST, NAME, GraphFolder
from export.preflight.rule import readable, rule

INT32, INT64 = 6, 7  # ONNX's numbers of types
STARTS = ("input_ids", "input_embeds", "inputs_embeds")  # what the first part may read


def as_compiled(name: str) -> str:
    """A tensor's name as the compiler writes it."""
    return name.replace("/", "_").replace(".", "_")


@rule(
    "names-clash",
    "error",
    wrong="q/proj and q.proj",
    source="compiler: / and . become _",
    remedy="rename one of them",
)
def names_clash(graph: GraphFolder):
    """Names stay different when the compiler turns every `/` and `.` into `_`."""
    nodes = (name for node in graph.graph.nodes for name in node.outputs)
    given = dict.fromkeys([*(v.name for v in graph.ends), *(t.name for t in graph.graph.initializers), *nodes])
    groups: dict[str, list[str]] = {}
    for name in given:
        groups.setdefault(as_compiled(name), []).append(name)
    for flat, same in groups.items():
        if len(same) > 1:
            yield from ((name, f"they all become {readable(flat)}") for name in same)


@rule(
    "graph-misnamed",
    "error",
    wrong="prompt_ar1_cl4096_2_of_5",
    source="zoo: get_qnn_context_graph_name",
    remedy="call it {prompt|token}_ar{S}_cl{C}_{i}_of_{N}",
)
def graph_misnamed(graph: GraphFolder):
    """Genie reads from the name how many tokens go at a time, the context and the part; shapes say the same."""
    if not graph.is_language_model:
        return
    if not graph.called:
        yield "", f"the folder is called {readable(graph.name)}"
        return
    kind, tokens, context, number, total = graph.called
    if not 1 <= number <= total:
        yield "", f"it is part {number} of {total}"
    if kind and (kind == "token") != (tokens == 1):
        yield "", f"it is called {kind}, with {tokens} tokens at a time"
    if graph.window and graph.window != (tokens, context):
        yield (
            "attention_mask",
            f"the name says ar{tokens}_cl{context}, the mask's shape ar{graph.window[0]}_cl{graph.window[1]}",
        )
    own = NAME.fullmatch(graph.graph.name)
    if own and own[0] != NAME.search(graph.name)[0]:  # type: ignore[index]
        yield "", f"the graph in the file is called {readable(graph.graph.name)}"


@rule(
    "io-extra",
    "warning",
    wrong="probs as an output",
    source="zoo: _get_output_names",
    remedy="compile it to look inside, and leave it out for Genie",
)
def io_extra(graph: GraphFolder):
    """Every output is one that Genie asks for; a probe is not."""
    if graph.is_language_model:
        for value in graph.graph.outputs:
            if not CACHE.fullmatch(value.name) and not (graph.gives and value.name == graph.gives.name):
                yield value.name, "Genie does not know this output"


@rule(
    "io-misnamed",
    "error",
    wrong="past_key_values.0.key",
    source="zoo: _get_input_spec",
    remedy="rename it; export/graphs/plan.py lists what each is called",
)
def io_misnamed(graph: GraphFolder):
    """Genie finds inputs and outputs by name: ids or one hidden state, the mask, cos and sin, each layer's cache."""
    if not graph.is_language_model:
        return
    inputs, outputs = ({value.name for value in values} for values in (graph.graph.inputs, graph.graph.outputs))
    for values, first, what in (
        (graph.graph.inputs, graph.reads, "input"),
        (graph.graph.outputs, graph.gives, "output"),
    ):
        for value in values:
            known = value.name in HOST or CACHE.fullmatch(value.name) or (first and value.name == first.name)
            if not known and what == "input":
                yield value.name, "Genie does not know this input"
        if not first:
            yield "", f"there is no hidden state among the {what}s"
    came, gone = graph.cache(graph.graph.inputs), graph.cache(graph.graph.outputs)
    layers = {layer for layer, _ in [*came, *gone]}
    for layer in sorted(layers):
        for kind in ("key", "value"):
            for has, way in ((came, "in"), (gone, "out")):
                if (layer, kind) not in has or not has[layer, kind].name.endswith(way):
                    yield f"past_{kind}_{layer}_{way}", "it is missing"
    if layers and "attention_mask" not in inputs:
        yield "attention_mask", "it is missing"
    if ("position_ids_cos" in inputs) != ("position_ids_sin" in inputs):
        yield "position_ids_cos", "cos and sin come together or not at all"
    for name in sorted(outputs & {*HOST, *STARTS}):
        yield name, "it is an output, but has the name of an input"


@rule(
    "alibi",
    "warning",
    wrong="attention_mask (1, 40, 128, 4096)",
    source="zoo: _get_input_spec",
    remedy="run the graphs from a host of your own, with ALiBi in its mask",
)
def alibi(graph: GraphFolder):
    """Genie gives every part with layers cos, sin and a mask with one head, because it computes rotary positions."""
    inputs = {value.name: value for value in graph.graph.inputs}
    if not graph.cache(graph.graph.inputs) or "attention_mask" not in inputs:
        return
    shape = inputs["attention_mask"].shape or ()
    if len(shape) == 4 and shape[1] != 1:
        yield "attention_mask", f"it has {shape[1]} heads"
    if not {"position_ids_cos", "position_ids_sin"} & set(inputs):
        yield "", "it takes no cos and sin"


@rule(
    "io-misordered",
    "warning",
    wrong="position_ids_cos before attention_mask",
    source="zoo: _get_input_spec; client: order of a dict",
    remedy="export in this order, or feed in the graph's",
)
def io_misordered(graph: GraphFolder):
    """AI Hub matches data to inputs by their order: hidden state, mask, cos, sin, then key and value of each layer."""
    if not graph.is_language_model:
        return
    for values, first in ((graph.graph.inputs, graph.reads), (graph.graph.outputs, graph.gives)):
        given = [value.name for value in values]
        cached = graph.cache(values)
        wanted = [first.name] if first else []
        wanted += [name for name in HOST if name in given]
        wanted += [cached[key].name for key in sorted(cached)]
        known = set(wanted)
        there = [name for name in given if name in known]
        for place, (name, want) in enumerate(zip(there, wanted, strict=False)):
            if name != want:
                yield name, f"{readable(want)} comes before it, as number {place + 1}"
                break


@rule(
    "io-misshapen",
    "error",
    wrong="past_key_0_in (1, 32, 3968, 128)",
    source="zoo: _get_input_spec",
    remedy="export with these layouts; Genie keeps its cache in them",
)
def io_misshapen(graph: GraphFolder):
    """Ids (1, S), mask (1, 1, S, C), cos and sin (1, 1, S, D/2), keys (K, 1, D, C-S), values (K, 1, C-S, D)."""
    if not graph.is_language_model or not graph.window:
        return
    S, C = graph.window
    if not 1 <= S < C:
        yield "attention_mask", f"{S} tokens at a time in a context of {C} leave no past"
    wanted = _shapes(graph, S, C)
    for value in graph.ends:
        want, have = wanted.get(value.name), value.shape
        if not want or have is None or not all(isinstance(size, int) for size in have):
            continue
        if len(have) != len(want) or any(w != h for w, h in zip(want, have, strict=True) if isinstance(w, int)):
            said = ", ".join("any" if size is ... else str(size) for size in want)
            yield value.name, f"its shape is {have}, expected ({said})"
        if value.name == "input_ids" and value.dtype not in (INT32, INT64):
            yield value.name, "ids are int32"


def _shapes(graph: GraphFolder, S: int, C: int) -> dict[str, tuple]:
    """The shape that each end should have; `...` is any size. Heads and width are those of most of the cache."""
    came, gone = graph.cache(graph.graph.inputs), graph.cache(graph.graph.outputs)
    shapes = [(kind, value.shape) for (_, kind), value in [*came.items(), *gone.items()] if len(value.shape or ()) == 4]
    heads = Counter(shape[0] for _, shape in shapes if shape)
    dims = Counter(shape[2 if kind == "key" else 3] for kind, shape in shapes if shape)
    K, D = (most[0][0] if (most := counted.most_common(1)) else name for name, counted in (("K", heads), ("D", dims)))
    half = D // 2 if isinstance(D, int) else "D/2"
    wanted: dict[str, tuple] = {"attention_mask": (1, ..., S, C)}
    wanted |= dict.fromkeys(HOST[1:], (1, 1, S, half)) | dict.fromkeys(STARTS[1:], (1, S, ...)) | {"input_ids": (1, S)}
    for values, length in ((came, C - S), (gone, S)):
        for (_, kind), value in values.items():
            wanted[value.name] = (K, 1, D, length) if kind == "key" else (K, 1, length, D)
    for first in (graph.reads, graph.gives):
        if first and first.name not in wanted:
            wanted[first.name] = (1, S, ...)
    return wanted
