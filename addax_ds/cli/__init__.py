"""The console command: one file per command that is more than a call."""
