"""What an operation and a number format mean: NumPy in, NumPy out, no model."""
