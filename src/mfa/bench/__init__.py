"""Benchmarks and a cost model: `python -m mfa bench --help`."""
