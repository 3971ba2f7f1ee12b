"""Benchmarks behind the tables of README and docs/performance.md: each module prints a table and writes it as JSON."""
