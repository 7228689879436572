"""The one exception that is meant for the person at the keyboard."""


class UserError(Exception):
    """A mistake or fault that the user can mend.

    The message says in one or two lines what was given, what was expected and what to do. The program prints
    it without a traceback; anything else that escapes is a bug and keeps its traceback.
    """


def brief(error: Exception) -> str:
    """What an exception says, on one line of at most 300 characters: some quote whole values."""
    return f"{' '.join(str(error).split()):.300}"
