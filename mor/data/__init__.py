"""Text to batches of tokens, and tasks that make their own."""
