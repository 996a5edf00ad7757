"""4-bit weights: which matrix becomes which format, and the folder that holds the result."""
