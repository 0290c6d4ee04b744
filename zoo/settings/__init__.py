"""From what a person typed to one typed, checked config."""
