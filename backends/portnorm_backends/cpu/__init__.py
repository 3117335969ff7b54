"""Kernels for NumPy arrays, compiled by numba, and what uses them."""
