"""Files that somebody else wrote, read as data and in bounded memory."""
