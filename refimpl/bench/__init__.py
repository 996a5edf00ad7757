"""How fast the model and its files are, beside other engines."""
