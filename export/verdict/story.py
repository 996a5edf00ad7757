"""The story of a verdict: which sentence follows which. `english.py` has the sentences."""

from __future__ import annotations

import shlex
from typing import Any

from export.verdict import english
from export.verdict.judged import HEADS, HERE, MAPPING, Judged


def summary(of: Judged, say: Any = english) -> str:
    """The verdict in one line."""
    if not of.tensors:
        return say.NOTHING_COMPARED
    if of:
        given = sum(map(of.thresholds.judge, of.tensors))
        rule = say.rule(given, len(of.tensors) - given, of.thresholds == type(of.thresholds)())
        return say.agrees(len(of.tensors), rule, of.kind, of.worst[0], of.excess(of.worst[0]), len(of.unjudged))
    guilty = of.guilty
    assert guilty is not None
    return say.differs(len(of.failures), len(of.tensors), guilty, of.excess(guilty))


def story(of: Judged, say: Any = english) -> str:
    """What is wrong, where it begins, and why, a sentence a line; "" if nothing is wrong."""
    guilty = of.guilty
    if guilty is None:
        return ""
    if guilty.problem == "missing":
        return say.missing(guilty.name)
    lines = [say.begins(guilty)]
    if not guilty.problem:
        lines.append(say.extent(guilty, of.thresholds.judge(guilty)))
    elif guilty.needs.tokens:
        lines.append(say.not_finite(guilty))
    if len(of.suspects) > 1:
        lines.append(say.suspected(of.suspects, of.before))
    elif of.output_alone(guilty):
        lines.append(say.output_alone(unseen=guilty.operation != HEADS[2]))
    cause = of.causes.get(guilty.name)
    lines.append(say.likely(str(cause or ""), cause is not None and cause.partial))
    lines += [say.also(name, str(cause)) for name, cause in of.causes.items() if name != guilty.name]
    lines += [say.inherited(len(of.inherited))] if of.inherited else []
    lines += [say.absent([tensor.name for tensor in of.absent])] if of.absent else []
    return "\n".join(lines)


def next_step(of: Judged, say: Any = english) -> str:
    """The command that tells more, or the one to run once it is mended; "" for what was computed here."""
    if of.about.get("outputs") == HERE:
        return ""
    verify, bisect = _commands(of)
    if of.failures and len(of.absent) == len(of.failures):
        return say.fetch([tensor.name for tensor in of.absent], verify)
    if of.failures and not of.about.get("model"):
        return say.give_the_model(verify)
    if guilty := of.guilty:
        cause = of.causes.get(guilty.name)
        known = cause is not None and not cause.partial and len(of.suspects) == 1
        return say.mend(verify) if known else say.search(bisect)
    if of.kind.on_grids and not of.about.get("model"):
        return say.agrees_without_the_model(verify)
    if of.unjudged:
        return say.run_the_rest(of.unjudged, verify)
    chained = any(tensor.way == "chained" for tensor in of.tensors)
    return say.keep(verify) if chained or len(of.inside) < 2 else say.chain(verify)


def _commands(of: Judged) -> tuple[str, str]:
    """The commands that judge such outputs again, and that search: with what ran the graphs, here or elsewhere."""
    folder = str(of.about.get("export") or "DIR")
    outputs = str(of.about.get("outputs") or MAPPING)
    model = ["--model", "MODEL"]
    if soc := of.about.get("soc"):
        soc = ["htp", "--soc", str(soc)]
        verify, bisect = [folder, "--engine", *soc], [folder, *model, "--executor", *soc]
    else:
        verify = [folder, "OUTPUTS" if outputs.startswith(MAPPING) else outputs]
        bisect = [*verify, *model, "--executor", "hub", "--device", "NAME"]
    return shlex.join(["refimpl", "verify", *verify]), shlex.join(["refimpl", "bisect", *bisect])


def logits(of: Judged, say: Any = english) -> list[str]:
    """What the error does to the next token, a line for each graph that gives logits; last those without figures."""
    shown = [tensor for tensor in of.tensors if tensor.logits is not None]
    return [say.logits(tensor) for tensor in shown] + unmeasured(of, say)


def unmeasured(of: Judged, say: Any = english) -> list[str]:
    """A line for logits that have neither KL nor top-1."""
    return [say.logits(tensor) for tensor in of.tensors if tensor.tap == "lm_head" and tensor.logits is None]


def table(of: Judged, limit: int = 20, say: Any = english) -> str:
    """The worst tensors, a line each."""
    shown, rest = of.worst[:limit], of.worst[limit:]
    width = max([len(tensor.name) for tensor in shown] + [6])
    lines = [say.head(width)] + [say.line(tensor, of.excess(tensor), width) for tensor in shown]
    if rest:
        lines.append(say.more(len(rest), sum(not of.excess(tensor) <= 1 for tensor in rest)))
    return "\n".join(lines)
