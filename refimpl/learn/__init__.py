"""The textbook and its exercises. It stands above all packages but the command line."""
