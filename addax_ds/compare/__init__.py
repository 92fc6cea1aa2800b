"""Methods side by side: the same data, engine and tuning effort for each, several seeds, one table."""
