"""`python -m addax_ds`."""

from addax_ds.cli.main import main

main()
