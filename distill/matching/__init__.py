"""Match positions of student and teacher, and weigh them."""
