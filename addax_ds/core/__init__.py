"""The method: noise, lanes, scalars and the fused update. Knows torch; knows no engine, data or file."""
