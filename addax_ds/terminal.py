"""Tables for the terminal."""

from rich.console import Console
from rich.table import Table


def show_whole(table: Table) -> None:
    """Print every cell in full; where the terminal is narrower, its lines wrap."""
    console = Console()
    needed = Console(width=10_000).measure(table).maximum
    Console(width=max(console.width, needed)).print(table)
