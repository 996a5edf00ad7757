"""The search for the first wrong operation, in few runs."""
