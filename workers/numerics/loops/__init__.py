"""Loops over numbers that Numba compiles for this machine's processor: what torch's operators do in many passes."""
