"""How the rows of one image (crops, frames) become one sequence."""
