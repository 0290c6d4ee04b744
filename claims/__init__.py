"""What papers claim, as small experiments: `zoo bench claims`."""
