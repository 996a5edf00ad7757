"""What a phone needs beside the graphs: the bundle for Genie."""
