"""Teachers: live models, and stores of their outputs."""
