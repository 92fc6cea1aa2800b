"""The op that DeepSpeed compiles at its first start on CPUs.

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


def build_cpu_op(*, abandoned: float = _ABANDONED) -> None:
    """Compile DeepSpeed's CPU op if that is still to do, whatever a killed build left behind.

    Waits while another process of this project builds it. A guard that nobody of this project holds is
    another program's build, or what was left of one: it is removed when it is `abandoned` seconds old.
    Call it in one process of a machine, before the first `deepspeed.init_distributed` of any. It does
    nothing where DeepSpeed runs on an accelerator.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
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
            print("compiling DeepSpeed's CPU op (about a minute, once)", file=sys.stderr)
        builder.load(verbose=False)
