"""One card per named model, and the small weights that ship with it."""
