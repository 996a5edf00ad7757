"""Numba twins of the operations and of the search for scales: the same bits at any number of threads."""
