"""Pixels -> features, on encoders of three libraries."""
