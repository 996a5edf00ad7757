"""Pictures of arrays, for pages that a person reads."""
