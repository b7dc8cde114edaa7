"""Benchmarks: a result is checked before it is timed. docs/benchmarks.md says what is counted."""
