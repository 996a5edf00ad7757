"""What a wrong tensor looks like, and which known fault makes it so."""
