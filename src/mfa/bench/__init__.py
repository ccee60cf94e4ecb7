"""Benchmarks, each a module to run: `python -m mfa.bench.cpu`."""
