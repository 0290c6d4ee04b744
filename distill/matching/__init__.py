"""Which positions of student and teacher belong together, and with what weight."""
