"""The suites that are run with `python -m benchmarks`."""
