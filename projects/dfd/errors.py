"""The error that a user caused and can repair."""


class UserError(ValueError):
    """Bad input: its message is one line that says what is wrong, where, and what to do.

    ``train_net.py`` and the tools print the message without a traceback and exit with code 1.
    """


def first_line(error: BaseException) -> str:
    """What a foreign error says, for use within a message of one line."""
    lines = (str(error).strip() or type(error).__name__).splitlines()
    if len(lines) > 1 and lines[0].endswith(":"):  # A heading.
        return f"{lines[0]} {lines[1].strip()}"
    return lines[0]
