"""Byte fallback: a function of its own."""

from collections.abc import Iterator

from refimpl.learn.exercise import Case, Exercise, Words


def cases() -> Iterator[Case]:
    for about, character in (
        ("a letter", "é"),
        ("plain ASCII", "a"),
        ("a Chinese character", "月"),
        ("an emoji", "🌙"),
    ):
        yield Case(about, (ord(character),), list(character.encode()))


exercise = Exercise(
    kind="function",
    function="utf8",
    breaks='a letter',
    title=Words(en='The bytes of a character', zh='一个字符的字节'),
    task=Words(
        en="""Return the bytes of UTF-8 of the character with the number n, as a list, without str.encode.
Below 128 one byte, below 2048 two (from 192), below 65536 three (from 224), else four (from 240). All bytes behind the first are 128 and six bits.""",
        zh="""返回编号为 n 的字符的 UTF-8 字节，用列表表示，不许用 str.encode。
小于 128 一个字节；小于 2048 两个（首字节从 192 起）；小于 65536 三个（从 224 起）；其余四个（从 240 起）。后面每个字节是 128 加六位。""",
    ),
    hints=(
        Words(en='n % 64 are the last six bits, n // 64 the rest.', zh='n % 64 是最后六位，n // 64 是其余的。'),
        Words(en='The bytes behind the first: 128 + n // 64**k % 64, the last one with k = 0.', zh='后面的字节：128 + n // 64**k % 64，最后一个 k = 0。'),
    ),
    cases=cases,
)  # fmt: skip


@exercise.starts_as
def starter(n):
    return [n]  # fill in


@exercise.solved_by
def solution(n):
    more, first = (0, 0) if n < 128 else (1, 192) if n < 2048 else (2, 224) if n < 65536 else (3, 240)
    return [first + n // 64**more, *(128 + n // 64**k % 64 for k in range(more - 1, -1, -1))]


@exercise.mistaken(en="the bytes stand in the wrong order: the highest bits come first", zh="字节次序反了：高位在前")
def backwards(n):
    more, first = (0, 0) if n < 128 else (1, 192) if n < 2048 else (2, 224) if n < 65536 else (3, 240)
    return [first + n // 64**more, *(128 + n // 64**k % 64 for k in range(more))]


@exercise.mistaken(en="the bytes behind the first have 128 added", zh="后面的字节都要加 128")
def unmarked(n):
    more, first = (0, 0) if n < 128 else (1, 192) if n < 2048 else (2, 224) if n < 65536 else (3, 240)
    return [first + n // 64**more, *(n // 64**k % 64 for k in range(more - 1, -1, -1))]
