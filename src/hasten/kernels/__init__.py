"""Triton and native kernels, reached only through registered torch operators. None yet."""
