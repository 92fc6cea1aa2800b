"""What goes wrong: input that a user can mend, and the end of ranks."""

import torch.distributed as dist


class UserError(ValueError):
    """Bad input: one line that says what is wrong and what to do.

    Commands print it without a traceback and exit with status 2. It is a `ValueError`, so that
    library users catch it the usual way.
    """


class PreemptedError(Exception):
    """The run was asked to end and has saved its state; the message says how it goes on."""


class RankLostError(Exception):
    """A collective failed because another rank has ended or does not answer."""


class OutOfMemoryError(Exception):
    """A rank has too little memory for what its settings ask."""


def of_another_rank(error: BaseException | None) -> BaseException | None:
    """That error, or one that it followed upon, which is of a collective that another rank has left; else None."""
    closed = ("closed by peer", "reset by peer", "broken pipe", "connection refused")
    words = (*closed, "timed out", "timeout", "no route to host", "network is unreachable")
    while error is not None:
        told = isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
        if told or isinstance(error, dist.DistError):
            return error
        error = error.__context__
    return None
