"""Teachers: live ones, and what they said kept in files."""
