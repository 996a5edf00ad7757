"""The one exception of this project that is meant to be read by a person rather than a debugger."""


class InputError(ValueError):
    """What you were given is wrong: says what is, what was expected and what to do, in one line.

    Raised for files, arguments and tensors that come from outside. The command line prints the message alone
    and exits with code 2; every other exception is a bug of ours and shows its traceback.
    """


def at_most(items, limit: int = 5) -> str:
    """A comma-separated list that stays one line: the first `limit` items and how many more there are."""
    items = [str(item) for item in items]
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more
