"""Records to batches: sources, task templates, the length partition, batches that no world size changes."""
