"""`addax-ds compare`."""

from pathlib import Path

from addax_ds.compare.execute import execute
from addax_ds.compare.plan import check, load_comparison
from addax_ds.compare.results import PLOT, table, write
from addax_ds.config.checks import require
from addax_ds.terminal import show_whole


def compare(file: Path, output: Path, at_once: int) -> None:
    """Run what the file compares and show the table."""
    require(at_once >= 1, f"--at-once {at_once}: give 1 or more")
    comparison = load_comparison(file)
    check(comparison)
    results, seconds = execute(comparison, output, at_once)
    show_whole(table(comparison, results))
    path = write(comparison, results, output)
    print(f"table: {path}, plot: {path.with_name(PLOT)}; all runs took {seconds / 3600:.2g} hours")
