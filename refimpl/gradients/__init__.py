"""Gradients of the one forward, and the fine-tuning that they make possible."""
