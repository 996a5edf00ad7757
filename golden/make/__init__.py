"""Making goldens, and the embedded model, with PyTorch: the only room that imports torch."""
