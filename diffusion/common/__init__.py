"""Foundations that every other package stands on: files, errors, randomness, devices, threads."""
