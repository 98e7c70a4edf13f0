"""The error that a user caused and can repair."""


class UserError(ValueError):
    """Bad input: its message is one line that says what is wrong, where, and what to do.

    ``train_net.py`` and the tools print the message without a traceback and exit with code 1.
    """

    def __init__(self, message: object = "") -> None:
        lines = str(message).strip().splitlines()
        if any(line.startswith("Original Traceback") for line in lines):
            # So torch raises what a loader's worker process has raised; what it said comes last.
            lines = [lines[-1].partition(f"{type(self).__name__}: ")[2]]
        # What it names (a file, a value) may have line breaks in it.
        super().__init__(" ".join(lines))


def first_line(error: BaseException) -> str:
    """What a foreign error says, for use within a message of one line."""
    lines = (str(error).strip() or type(error).__name__).splitlines()
    if len(lines) > 1 and lines[0].endswith(":"):  # A heading.
        return f"{lines[0]} {lines[1].strip()}"
    return lines[0]
