"""The language model, unmodified, and its attention."""
