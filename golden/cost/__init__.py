"""What a change of the model costs: perplexity, KL divergence, and the share of each tensor in it."""
