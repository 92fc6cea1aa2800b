"""`addax-ds verify`: do all ranks have the same before a job is trusted to them?"""

from collections.abc import Callable

from rich.console import Console
from rich.table import Table

from addax_ds.config import RunConfig
from addax_ds.errors import UserError
from addax_ds.training.verify import Report, disagreements, gather, report_of, usual


def verify(load: Callable[[], RunConfig]) -> None:
    """Print what the ranks have, on rank 0. Raises `UserError` that names rank, node and item.

    load: reads the settings; a rank that cannot is one that differs.
    """
    own: list[Report] = []

    def report(rank: int, local_rank: int) -> Report:
        own.append(report_of(load, rank, local_rank))
        return own[0]

    try:
        minutes = load().timeout_minutes
    except UserError:
        minutes = RunConfig().timeout_minutes
    reports = gather(report, minutes)
    lines = disagreements(reports)
    if own[0].rank == 0:
        table = Table(title=f"{len(reports)} ranks on {len({report.node for report in reports})} nodes")
        table.add_column("item")
        table.add_column("on most ranks")
        table.add_column("ranks that agree", justify="right")
        for item in reports[0].items:
            value, count = usual(reports, item)
            table.add_row(item, value, f"{count} of {len(reports)}")
        Console().print(table)
        print(*lines, sep="\n", end="\n" if lines else "")
    if lines:
        raise UserError(f"{lines[0]}: mend that before a job runs on it")
