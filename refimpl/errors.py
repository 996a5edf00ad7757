"""The one exception of this project that is meant to be read by a person rather than a debugger."""


class InputError(ValueError):
    """A file, an argument or a tensor from outside is wrong. One line says what was found and expected, and what to do.

    The command line prints this line alone and exits with code 2. Every other exception is a bug of ours and shows
    its traceback.

    >>> print(InputError("the file has a tensor '\\x1b[2J\\n'"))
    the file has a tensor '\\x1b[2J\\n'
    """

    def __init__(self, message: str):
        super().__init__(one_line(message))


class Remark(UserWarning):
    """A warning: the input can be used, but is not what it seems. The command line prints it as one line."""


def one_line(text: str) -> str:
    """The text with control characters and line breaks escaped, because names may come from hostile files."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


# Control characters but tab and line break, and the marks that change the direction in which the text behind is read.
_UNSEEN = [
    *range(9),
    *range(11, 32),
    *range(127, 160),
    0x61C,
    0x200E,
    0x200F,
    *range(0x202A, 0x202F),
    *range(0x2066, 0x206A),
]
_SEEN = {code: ascii(chr(code))[1:-1] for code in _UNSEEN}


def visible(text: str) -> str:
    r"""The text with what moves a cursor or turns the reading direction escaped. Line breaks and tabs stay.

    >>> print(visible("a\x1b[2J\u202eb"))
    a\x1b[2J\u202eb
    """
    return text.translate(_SEEN)


def at_most(items, limit: int = 5) -> str:
    """A comma-separated list that stays one line: the first `limit` items and how many more there are."""
    items = [str(item) for item in items]
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more


def near(name: str, known: set[str]) -> str:
    """The end of an error message about an unknown name: known names that resemble it, else some of all."""
    import difflib

    close = difflib.get_close_matches(name, known, 3, 0.6) if len(name) < 200 else []
    return f"; near it are {at_most(close)}" if close else f"; it has {at_most(sorted(known), 3)}"
