"""Other libraries' errors in our own messages."""


def first_line(error: BaseException) -> str:
    """The first line of what an error says, without a full stop; its type, if it says nothing."""
    lines = str(error).strip().splitlines() or [repr(error)]
    return lines[0].rstrip(".")
