"""The one exception for input that a user can mend."""


class UserError(ValueError):
    """Bad input: one line that says what is wrong and what to do.

    Commands print it without a traceback and exit with status 2. It is a `ValueError`, so that
    library users catch it the usual way.
    """


class PreemptedError(Exception):
    """The run was asked to end and has saved its state; the message says how it goes on."""


class RankLostError(Exception):
    """A collective failed because another rank has ended or does not answer."""
