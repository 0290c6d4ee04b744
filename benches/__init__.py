"""Benches: each compares on one machine and in one run; `zoo.cli.bench` has the table of their names."""
