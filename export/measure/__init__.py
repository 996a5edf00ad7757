"""What a device answered beside what it should have: references, distances, places."""
