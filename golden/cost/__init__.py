"""What a change of the model costs: perplexity, KL divergence, and each tensor's part in it."""
