"""The sentences of a verdict and of a search, in English. Another language is another file with the same names.

The sentence of a cause stands in its detector (`export/causes/`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from export.measure.figures import Comparison, Needs
from export.measure.kinds import Kind
from refimpl.errors import at_most

LISTED = 10  # suspects that a sentence names

NOTHING_COMPARED = "differs: nothing was compared"
HALVES = (
    "most outputs of the device are float16 numbers and the oracle's are not, so the device is judged as one that "
    "computes in float16; give dtype float32 to judge it more strictly"
)
WITHIN_HALVES = "all tensors are within float16's rounding; if the device computes in float16, give dtype float16"
EXPLAINED = "what rounding explains"


# A verdict in one line


def agrees(count: int, rule: str, kind: Kind, worst: Comparison, excess: float, unjudged: int = 0) -> str:
    """All tensors are right; `unjudged` graphs have no outputs."""
    needs = worst.problem or share(excess)
    rest = f"; {unjudged} graph{'s are' if unjudged > 1 else ' is'} not judged" if unjudged else ""
    like = f"the device computes like {kind.text}"
    return f"agrees: {count} tensors within {rule}; {like}; worst {worst.name}, {needs}{rest}"


def differs(failing: int, count: int, first: Comparison, excess: float) -> str:
    """Some tensors are wrong."""
    said = first.problem or times(excess)
    return f"differs: {failing} of {count} tensors; the first is {first.name}, {said}"


def share(excess: float) -> str:
    """How much of what is allowed a right tensor needs."""
    return "nearly all of what is allowed" if f"{excess:.2g}" == "1" else f"{excess:.2g} of what is allowed"


def times(excess: float) -> str:
    """How many times what is allowed a wrong tensor needs; "1 times" would sound like a right one."""
    return "a little more than what is allowed" if f"{excess:.2g}" == "1" else f"{excess:.2g} times what is allowed"


def rule(given: int, others: int, default: bool) -> str:
    """What the tensors were judged by: `given` of them by given numbers, `others` by what rounding explains."""
    if not given:
        return EXPLAINED + ("" if default else ", for none has codes to count")
    return "the given limits" + (f", {others} without codes within {EXPLAINED}" if others else "")


# Where it begins


def missing(name: str) -> str:
    """A tensor that did not come back."""
    return f"{name} is not among the outputs, so it cannot be judged."


def begins(guilty: Comparison) -> str:
    """The first wrong tensor."""
    return f"It begins in {guilty.graph}, {where(guilty)}" + (f": {guilty.problem}." if guilty.problem else ".")


def where(one: Comparison) -> str:
    """Layer and operation."""
    return f"layer {one.layer}, {one.operation}" if one.layer is not None else one.operation


def wrong_in(needs: Needs) -> str:
    """Which tokens, and which heads, are beyond what is allowed: "tokens 1, 2 of 9, all 4 heads"."""
    parts = []
    for what, numbers in (("token", needs.tokens), ("head", needs.heads)):
        bad = [i for i, x in enumerate(numbers) if not x <= 1]
        if 0 < len(bad) < len(numbers):
            parts.append(f"{what}{'s' if len(bad) > 1 else ''} {at_most(bad, 8)} of {len(numbers)}")
        elif bad and len(numbers) > 1:
            parts.append(f"all {len(numbers)} {what}s")
    return ", ".join(parts)


def extent(one: Comparison, by_number: bool) -> str:
    """Which tokens and heads are off, and by how much. `by_number`: judged by a number that somebody gave."""
    place = wrong_in(one.needs)
    if place:
        start = f"Wrong in {place}"
    elif len(one.needs.tokens) == 1:
        start = "Wrong in its one token"
    else:
        start = "Beyond the given limits" if by_number else "Wrong by a little everywhere"
    most = one.codes.largest or 0
    over = f", {one.codes.over:.0%} by more than one" if most > 1 else ""
    codes = f", up to {most:.0f} code{'s' * (most > 1)} off{over}" if most else ""
    cost = f"; quantization alone costs {one.cost.sqnr:.1f} dB" if one.kind.coded else ""
    return f"{start}: {one.device.sqnr:.1f} dB to {one.kind.text}{codes}{cost}."


def not_finite(one: Comparison) -> str:
    """Where a tensor is not finite, and its first such value."""
    place = wrong_in(one.needs) or "its one token"
    return f"Not finite in {place}; the first is at {one.device.index}, expected {one.device.reference:.5g}."


def suspected(taps: Sequence[str], before: str) -> str:
    """The suspected operations, and the last tensor before them."""
    until = f"Everything up to {before} is right, so the" if before else "The"
    among = ", ".join(taps) if len(taps) <= LISTED else f"the {len(taps)} operations from {taps[0]} to {taps[-1]}"
    return f"{until} wrong operation is one of {among}."


def output_alone(unseen: bool) -> str:
    """Everything computed from a tensor is right. `unseen`: attention may hide its error.

    A softmax hides an error that all keys, or keys and queries, have in common.
    """
    or_else = "; or attention does not see the error" if unseen else ""
    return (
        f"Everything computed from it is right, so only this output is wrong: its layout, name, scale or copy{or_else}."
    )


def likely(text: str, partial: bool) -> str:
    """The cause of the first wrong tensor; "" if nothing explains it."""
    if not text:
        return "No known pattern explains it."
    return f"{'Perhaps' if partial else 'Likely cause'}: {text}."


def also(name: str, text: str) -> str:
    """The cause of another tensor."""
    return f"Also {name}: {text}."


def inherited(count: int) -> str:
    """How many of the failing tensors only hand on an error."""
    if count == 1:
        return "1 of the other failing tensors only hands on what it was given."
    return f"{count} of the other failing tensors only hand on what they were given."


# Below it


def logits(one: Comparison) -> str:
    """What the error does to the distribution of the next token."""
    found = one.logits
    if found is None:
        return f"logits of {one.graph}, {one.way}: no KL and no top-1, because they cannot be compared: {one.problem}"
    return (
        f"logits of {one.graph}, {one.way}: KL {found.kl:.2g} nats, same top-1 {found.top1:.1%} "
        f"(quantization alone: {found.cost_kl:.2g}, {found.cost_top1:.1%})"
    )


def head(width: int) -> str:
    """The head of the table."""
    return f"      {'tensor':{width}}   excess    device      cost   LSB max  over 1  born"


def line(one: Comparison, excess: float, width: int) -> str:
    """A row of the table."""
    mark = "ok  " if excess <= 1 else "FAIL"
    if one.problem:
        return f"{mark}  {one.name:{width}}        –  {one.problem}"
    figures = f"{excess:7.2g}  {one.device.sqnr:5.1f} dB  {one.cost.sqnr:5.1f} dB"
    codes = one.codes
    lsb = f"{codes.largest:8.0f}  {codes.over:6.1%}" if codes.largest is not None else f"{'–':>8}  {'–':>6}"
    return f"{mark}  {one.name:{width}}  {figures}  {lsb}  {one.born.value}".rstrip()


def more(rest: int, failing: int) -> str:
    """What the table leaves out."""
    return f"      and {rest} more, {failing or 'none'} of them beyond what is allowed"


def without_outputs(graphs: Collection[str]) -> str:
    """Graphs that were not judged."""
    return f"not judged, because there are no outputs: {at_most(graphs, 6)}"


# What to do next


def run_the_rest(graphs: Collection[str], verify: str) -> str:
    """Graphs without outputs."""
    return f"Next: have the device run {at_most(graphs, 3)} as well, and judge all of it: {verify}"


def fetch(names: Collection[str], verify: str) -> str:
    """Outputs that did not come back, where all else is right."""
    return f"Next: fetch {at_most(names, 3)} from the device as well, and judge all of it: {verify}"


def give_the_model(verify: str) -> str:
    """Only with the model can it be told what is wrong inside of a graph."""
    return f"Next: give the model, which narrows the limits and tells more causes: {verify} --model MODEL"


def agrees_without_the_model(verify: str) -> str:
    """All is right, by limits that are as wide as all that quantization does from the beginning of a graph on."""
    return (
        "Without the model, each output may be off by as much as quantization makes it, so a fault inside of a graph "
        f"that is smaller than that passes.\nNext: give the model, which judges each operation: {verify} --model MODEL"
    )


def search(bisect: str) -> str:
    """Several operations are suspected, or no cause is known."""
    return f"Next: find the operation in the fewest runs: {bisect}"


def mend(verify: str) -> str:
    """The operation and its cause are known."""
    return f"Next: mend it, run the graphs again, and judge them: {verify} --model MODEL"


def chain(verify: str) -> str:
    """Each graph is right on golden inputs."""
    return f"Next: feed each graph what the one before it gave, and judge that: {verify} --chained"


def keep(verify: str) -> str:
    """All is right."""
    return f"Next: keep the figures, to hold later versions against them: {verify} --save RUN"


def absent(names: Collection[str]) -> str:
    """Outputs that did not come back, beside another fault."""
    return f"Not judged, because the device did not give {'them' if len(names) > 1 else 'it'}: {at_most(names, 4)}."


# A search


def nothing_wrong(healthy: Collection[str]) -> str:
    """All outputs are right."""
    return f"agrees: the outputs of {at_most(healthy, 4)} are right; nothing to localise"


def between(rivals: Collection[str], graph: str) -> str:
    """Operations that no run can tell apart."""
    return f"differs: one of {at_most(rivals, 6)} in {graph} is wrong; no run can tell which"


def found(guilty: str, graph: str, runs: int) -> str:
    """The first wrong tensor of a search."""
    return f"differs: {guilty} of {graph} is the first wrong tensor; {runs} runs"


def meaning(one: Comparison, text: str, guilty: str) -> str:
    """What the guilty tensor is; and its name in the graph, if that is another one."""
    return f"{where(one)}: {text}" + (f"; as {guilty}" if guilty != one.tap else "")


def computed_by(nodes: Collection[tuple[str, str]]) -> str:
    """The guilty operation."""
    return "computed by " + at_most([f"{op} {name}" for op, name in nodes], 8)


def given(right: Mapping[str, Comparison]) -> str:
    """What the guilty operation reads."""
    said = [f"{name} ({one.device.sqnr:.1f} dB)" for name, one in right.items()]
    return f"from what is right: {at_most(said, 6)}" if said else "from the graph's inputs"


def how_wrong(one: Comparison, excess: float, pieces: Collection[str]) -> str:
    """How far off the guilty tensor is, and where."""
    if one.problem:
        return f"It is wrong: {one.problem}."
    parts = [f"wrong only in {at_most(pieces, 6)}"] if pieces else []
    place = ", ".join(parts + [f"in {wrong}" for wrong in [wrong_in(one.needs)] if wrong])
    at = f"{one.device.value:.5g} at {one.device.index}, expected {one.device.reference:.5g}".replace(",)", ")")
    by = times(excess)
    return f"It has {one.device.sqnr:.1f} dB to {one.kind.text}, {by}{f', {place}' if place else ''}; worst {at}."


def hidden(taps: Collection[str]) -> str:
    """A fault that is gone as soon as one looks."""
    return (
        f"The fault is gone when {at_most(taps, 4)} is shown, so it comes from how the compiler joins operations; "
        "graphs that are cut off there (--until) may keep it."
    )


def beside(outputs: Collection[str]) -> str:
    """Wrong outputs that do not follow from the guilty tensor."""
    return f"{at_most(outputs, 4)} is wrong, too, and does not follow from it; so there is another fault."


def afterwards(spread: bool) -> str:
    """What the search could not see. `spread`: outputs that follow from the guilty tensor are wrong."""
    hides = "Outputs that follow from it are wrong anyway, so other faults may hide there." if spread else (
        "No output that follows from it is wrong.")  # fmt: skip
    return f"{hides} Mend it, and bisect again."


def cost(runs: int, bound: int, taps: int, known: bool) -> str:
    """How many runs it took."""
    before = "the outputs were known; " if known else ""
    return f"{before}{runs} runs, at most {bound} for one fault among {taps} taps:"


def run(showed: Collection[str], until: bool, wrong: Collection[str], gone: bool) -> str:
    """One run: what it showed, and whether that was right."""
    what = at_most(showed, 4)
    text = f"up to {what}" if until and what else f"with {what}" if what else "unchanged"
    if gone:
        return f"{text}: the outputs are right"
    return f"{text}: {'wrong ' + at_most(wrong, 4) if wrong else 'right'}"


def healthy(graphs: Collection[str]) -> str:
    """Graphs before the one that was searched."""
    return f"The outputs of {at_most(graphs, 4)} are right."
