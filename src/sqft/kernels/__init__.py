"""Compiled paths of core's functions: weights to the bit, or they are not used. In Triton for GPUs, in C++ for CPUs."""
