"""A folder of files to weights by name, whatever their layout."""
