"""`addax-ds replay`: a run audited against its journal, and rebuilt from it."""

from pathlib import Path

from addax_ds.config import load_run
from addax_ds.training.folder import CONFIG
from addax_ds.training.replay import audit
from addax_ds.training.replay import replay as rebuild


def replay(folder: Path, start: int | None, stop: int | None, output: Path | None) -> None:
    """Print what agrees and, of a zeroth-order run, what was rebuilt from how many bytes."""
    agreed, absent = audit(folder)
    print("agree: " + ", ".join(f"{count} of {item}" for item, count in agreed.items()))
    if absent:
        print(f"not there to compare with: {', '.join(absent)}")
    wanted = (start, stop, output) != (None, None, None)
    if load_run(str(folder / CONFIG), []).alpha < 1 and not wanted:
        print("first-order gradients are not in the journal, so this run can be audited, not rebuilt")
        return
    found = rebuild(folder, start, stop, output)
    steps = found.last - found.first
    print(
        f"rebuilt: steps {found.first + 1} to {found.last} from {found.journal_bytes:,} bytes of the journal"
        + (f" ({found.journal_bytes / steps:.0f} a step)" if steps else "")
    )
    print(f"digest: {found.digest}" + (", that of the run" if found.noted else ", of which the run noted none"))
    if output is not None:
        print(f"model: {output}")
