"""What a part of each kind has to do, as rules that run: `zoo test` and the project's own tests call the same ones."""
