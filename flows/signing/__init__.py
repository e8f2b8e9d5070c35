"""Signatures by a key of the user's: of files and folders (OpenSSF model signing) and of images (C2PA)."""
