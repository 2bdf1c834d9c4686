"""Triton kernels, installed as `mplug2_fast.kernels`."""
