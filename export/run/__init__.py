"""Who runs a graph: engines in this process, and the record of what ran."""
