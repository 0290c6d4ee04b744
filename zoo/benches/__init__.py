"""Benches: each compares on one machine and in one run; `zoo.bench` has the table of their names."""
