"""Compiled paths of core's functions; each gives core's result to the bit, or is not used. Needs Triton."""
