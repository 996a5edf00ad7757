"""Rules that find what a compiler or a phone would refuse."""
