"""CUDA C++ kernels (`*.cu`) for CuPy arrays, and what runs on the host to use them."""
