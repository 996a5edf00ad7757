"""A folder of graphs with golden inputs and outputs: emitted, saved, read, verified."""
