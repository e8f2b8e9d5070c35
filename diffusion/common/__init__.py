"""Utilities shared by all other packages: files, errors, random numbers, devices, threads."""
