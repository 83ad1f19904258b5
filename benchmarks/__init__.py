"""Benchmarks in pairs. docs/benchmarks.md says what each one is and how to run it."""
