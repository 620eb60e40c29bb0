"""Kernels behind registered torch operators: Triton for CUDA, C for CPUs. Reached through hasten.functional only."""
