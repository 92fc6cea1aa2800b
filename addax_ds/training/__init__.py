"""Runs: loading, the loop, evaluation, the files of a run folder."""
