"""Drills that need what CI has not; each is a target of the Makefile."""
