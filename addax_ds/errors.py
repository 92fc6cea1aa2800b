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


def is_of_another_rank(error: BaseException | None) -> bool:
    """Whether an error, or one that it followed upon, is that of a collective which another rank has left."""
    words = ("closed by peer", "reset by peer", "timed out", "timeout", "broken pipe", "connection refused")
    while error is not None:
        told = isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
        if told or isinstance(error, dist.DistError):
            return True
        error = error.__context__
    return False
