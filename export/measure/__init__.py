"""The outputs of a device beside the right ones: references, distances, places."""
