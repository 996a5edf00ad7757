"""The loss of a training step: a function of its own."""

from collections.abc import Iterator

import numpy as np

from refimpl.learn.exercise import Case, Exercise, Words


def cases() -> Iterator[Case]:
    rng = np.random.default_rng(0)
    for about, logits, labels in (
        ("two tokens", rng.normal(size=(2, 5)), [1, 4]),
        ("one left out", rng.normal(size=(3, 4)), [0, -100, 2]),
        ("large logits", 900 * rng.normal(size=(2, 3)), [0, 1]),
    ):
        kept = [(row, label) for row, label in zip(logits, labels, strict=True) if label >= 0]
        exact = [float(np.logaddexp.reduce(row) - row[label]) for row, label in kept]
        yield Case(about, (logits, np.array(labels)), sum(exact) / len(exact))


exercise = Exercise(
    kind="function",
    function="cross_entropy",
    breaks='two tokens',
    title=Words(en='Cross entropy', zh='交叉熵'),
    task=Words(en='Return the mean of -log p over the tokens: p is the share that softmax of the logits (T, V) gives to the label of each token. Labels of -100 are left out.', zh='返回各词元 -log p 的平均：p 是 logits（T, V）经 softmax 后给该词元标签的概率。标签为 -100 的不算。'),
    hints=(
        Words(en="-log p is logsumexp(logits) minus the label's logit.", zh='-log p 等于 logsumexp(logits) 减去标签的 logit。'),
        Words(en='Divide by the number of labels that count.', zh='除以算数的标签个数。'),
    ),
    cases=cases,
)  # fmt: skip


@exercise.starts_as
def starter(logits, labels):
    return 0.0  # fill in


@exercise.solved_by
def solution(logits, labels):
    kept = labels != -100
    x = logits[kept]
    m = x.max(-1, keepdims=True)
    log_sum = np.log(np.exp(x - m).sum(-1)) + m[:, 0]
    return float((log_sum - x[np.arange(len(x)), labels[kept]]).mean())


@exercise.mistaken(en="this is the sum, expected the mean", zh="这是总和，应当取平均")
def summed(logits, labels):
    kept = labels != -100
    x = logits[kept]
    m = x.max(-1, keepdims=True)
    log_sum = np.log(np.exp(x - m).sum(-1)) + m[:, 0]
    return float((log_sum - x[np.arange(len(x)), labels[kept]]).sum())


@exercise.mistaken(en="the sign is turned: a loss is never negative", zh="符号反了：损失不会是负的")
def negative(logits, labels):
    kept = labels != -100
    x = logits[kept]
    m = x.max(-1, keepdims=True)
    log_sum = np.log(np.exp(x - m).sum(-1)) + m[:, 0]
    return float((x[np.arange(len(x)), labels[kept]] - log_sum).mean())
