"""What an operation and a number format mean: NumPy in, NumPy out, no model.

`transformers` looks for an importable package of this name and takes it for Hugging Face's own when its
version is recent enough; the version below says that it is not.
"""

__version__ = "0.0.0"
