"""The price of a token: a function of its own."""

from collections.abc import Iterator

import numpy as np

from refimpl.learn.exercise import Case, Exercise, Words


def cases() -> Iterator[Case]:
    for about, tokens, (layers, heads, size), bits in (
        ("Baichuan2-7B, 4096 tokens, 16 bits", 4096, (32, 32, 128), 16),
        ("Qwen2-7B, 1 token, 8 bits", 1, (28, 4, 128), 8),
        ("the embedded model, 10 tokens, 32 bits", 10, (3, 4, 64), 32),
    ):
        arrays = [np.zeros((heads, tokens, size), f"V{bits // 8}") for _ in range(2)]
        yield Case(about, (tokens, layers, heads, size, bits), layers * sum(array.nbytes for array in arrays))


exercise = Exercise(
    kind="function",
    function="kv_bytes",
    breaks='Baichuan2-7B, 4096 tokens, 16 bits',
    title=Words(en='Bytes of a cache', zh='缓存的字节数'),
    task=Words(en='Return how many bytes the keys and values of `tokens` tokens take: layers, key heads, numbers in a head, bits of a number.', zh='返回 tokens 个词元的键和值共占多少字节；参数依次是层数、键头数、每头的数的个数、每个数的位数。'),
    hints=(
        Words(en='Keys and values: twice.', zh='键和值，两份。'),
        Words(en='A byte has 8 bits.', zh='一个字节 8 位。'),
    ),
    cases=cases,
)  # fmt: skip


@exercise.starts_as
def starter(tokens, layers, kv_heads, head_dim, bits):
    return 0  # fill in


@exercise.solved_by
def solution(tokens, layers, kv_heads, head_dim, bits):
    return 2 * tokens * layers * kv_heads * head_dim * bits // 8


@exercise.mistaken(en="there are values as well: twice as many", zh="还有值呢：要加倍")
def keys_alone(tokens, layers, kv_heads, head_dim, bits):
    return tokens * layers * kv_heads * head_dim * bits // 8


@exercise.mistaken(en="these are bits, expected bytes", zh="这是位数，应当是字节数")
def in_bits(tokens, layers, kv_heads, head_dim, bits):
    return 2 * tokens * layers * kv_heads * head_dim * bits
