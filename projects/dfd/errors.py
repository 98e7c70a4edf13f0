"""The error that a user caused and can repair."""


class UserError(ValueError):
    """Bad input: its message is one line that says what is wrong, where, and what to do.

    ``train_net.py`` and the tools print the message without a traceback and exit with code 1.
    """
