"""Attention over a sequence that is split across processes."""
