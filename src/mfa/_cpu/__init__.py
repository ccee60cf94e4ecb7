"""Attention on ATen for CPU tensors."""
