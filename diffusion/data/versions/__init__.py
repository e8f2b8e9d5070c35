"""Versions of a data set: what each holds, how two differ, and how images are taken down."""
