"""Signal to quantization noise: a function of its own."""

from collections.abc import Iterator

import numpy as np

import golden
from refimpl.learn.exercise import Case, Exercise, Words


def cases() -> Iterator[Case]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=50)
    for about, x_hat in (
        ("a tenth off", 1.1 * x),
        ("some noise", x + 0.01 * rng.normal(size=50)),
        ("rounded", np.round(x, 1)),
    ):
        error = golden.compare({"x": x_hat}, {"x": x}).tensors[0]
        yield Case(about, (x, x_hat), float(error.sqnr))


exercise = Exercise(
    kind="function",
    function="sqnr",
    breaks='a tenth off',
    title=Words(en='SQNR', zh='量化信噪比 SQNR'),
    task=Words(en='Return the power of x over the power of the error x_hat - x, in decibels: 10 log10 of their ratio.', zh='返回 x 的功率与误差 x_hat - x 的功率之比，单位分贝：比值的 10 log10。'),
    hints=(
        Words(en='Power is the sum of squares.', zh='功率就是平方和。'),
        Words(en='Decibels of power: 10 times the logarithm to base 10.', zh='功率的分贝：以 10 为底的对数乘 10。'),
    ),
    cases=cases,
)  # fmt: skip


@exercise.starts_as
def starter(x, x_hat):
    return 0.0  # fill in


@exercise.solved_by
def solution(x, x_hat):
    return float(10 * np.log10((x**2).sum() / ((x_hat - x) ** 2).sum()))


@exercise.mistaken(en="this is 20 log10; the ratio is already of powers", zh="用了 20 log10；这里的比值已经是功率之比")
def twice(x, x_hat):
    return float(20 * np.log10((x**2).sum() / ((x_hat - x) ** 2).sum()))


@exercise.mistaken(en="signal and noise are exchanged", zh="信号与噪声颠倒了")
def upside_down(x, x_hat):
    return float(10 * np.log10(((x_hat - x) ** 2).sum() / (x**2).sum()))


@exercise.mistaken(en="the logarithm is natural, expected to base 10", zh="用了自然对数，应当以 10 为底")
def natural(x, x_hat):
    return float(10 * np.log((x**2).sum() / ((x_hat - x) ** 2).sum()))
