"""GenieAccuracy's perplexity, and ours by its protocol, so that the two numbers are of the same tokens.

Genie cuts a text into pieces of as many tokens as the context holds, and drops what is left over. Of each piece it runs
the first context - AR tokens, AR at a time, and scores each of them by the token that follows in the text. The last AR
tokens are not run; the first of them scores the last token that is. Recomputed from Genie's own logits, this gives
Genie's number in every digit that it prints (QNN 2.51).

    perplexity(by_model(model), ids, context=4096, tokens=128)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from export.phone.host import Host
from export.run.executor import Executor
from refimpl.errors import InputError
from refimpl.model import Model

Scorer = Callable[[Sequence[int]], np.ndarray]


def pieces(ids: Sequence[int], context: int, tokens: int) -> Iterator[tuple[list[int], list[int]]]:
    """For each piece the tokens that are run, and the token by which each of them is scored.

    >>> list(pieces(range(19), context=8, tokens=2))
    [([0, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6]), ([8, 9, 10, 11, 12, 13], [9, 10, 11, 12, 13, 14])]
    """
    count = context - tokens
    for start in range(0, len(ids) - context + 1, context):
        yield list(ids[start : start + count]), list(ids[start + 1 : start + count + 1])


def perplexity(logits_of: Scorer, ids: Sequence[int], context: int, tokens: int) -> float:
    """exp of the mean negative log-likelihood, by the logits (tokens, vocabulary) of the tokens that are run.

    Raises InputError for a text shorter than the context: Genie scores nothing of it.
    """
    losses: list[np.ndarray] = []
    for run, targets in pieces(ids, context, tokens):
        logits = np.asarray(logits_of(run), np.float64)
        logits = logits - logits.max(-1, keepdims=True)
        losses.append(np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(targets)), targets])
    if not losses:
        raise InputError(f"the text has {len(ids)} tokens, Genie scores pieces of {context}; give a longer one")
    return float(np.exp(np.concatenate(losses).mean()))


def by_model(model: Model) -> Scorer:
    """Logits by a model: the oracle's, or a simulated one's."""
    return lambda ids: np.asarray(model(np.array([ids])))[0]


def by_graphs(host: Host, executor: Executor) -> Scorer:
    """Logits by the graphs of a coded export, fed as Genie does."""

    def logits(ids: Sequence[int]) -> np.ndarray:
        host.reset()
        size = max(host.graphs)
        return np.concatenate([host.run(ids[i : i + size], executor) for i in range(0, len(ids), size)])

    return logits
