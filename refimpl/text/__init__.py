"""Text to token ids and back; the chat layouts."""
