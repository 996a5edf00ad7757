"""Activations and weights on integer grids: encodings, calibration, simulation."""
