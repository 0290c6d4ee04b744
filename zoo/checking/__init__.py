"""What does not fit, said before weights are loaded, with changes that do."""
