"""Compiled paths of core's functions: weights to the bit, or they are not used. In Triton, and in C++ for decoding."""
