"""An export goes to devices of AI Hub and back."""
