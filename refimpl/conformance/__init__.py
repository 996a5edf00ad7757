"""Which features of the five families an engine computes as PyTorch does, and what is wrong with the others."""
