"""The ops that DeepSpeed compiles when they are first needed.

torch guards such a build by a file that the builder removes. A builder that was killed leaves it
behind, and from then on every process waits for that file to go, for ever.
"""

import contextlib
import os
import sys
import time
from pathlib import Path

import filelock
from torch.utils.cpp_extension import _get_build_directory

# Longer than any build of it takes, on a loaded machine too.
_ABANDONED = 180.0


COLLECTIVES = "ShareMemCommBuilder"
"""Of CPUs alone: DeepSpeed loads it in its first `init_distributed`."""
ADAM = "FusedAdamBuilder"


def build_op(name: str, *, abandoned: float = _ABANDONED) -> None:
    """Compile one of DeepSpeed's ops if that is still to do, whatever a killed build left behind.

    Waits while another process of this project builds it. A guard that nobody of this project holds is
    another program's build, or what was left of one: it is removed when it is `abandoned` seconds old.
    Call it in one process of a machine, before any needs the op. It does nothing where DeepSpeed has
    no such op for the device.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder(name)
    if builder is None or not deepspeed.ops.__compatible_ops__.get(builder.NAME, False):
        return
    folder = Path(_get_build_directory(builder.NAME, verbose=False))
    # The system frees this one when its holder dies.
    with filelock.FileLock(folder.with_suffix(".addax-ds.lock")):
        guard = folder / "lock"
        with contextlib.suppress(FileNotFoundError):
            while time.time() - guard.stat().st_mtime < abandoned:
                time.sleep(0.2)
            os.unlink(guard)
        if not (folder / f"{builder.NAME}.so").exists():
            print(f"compiling DeepSpeed's {builder.NAME} (about a minute, once)", file=sys.stderr)
        builder.load(verbose=False)
