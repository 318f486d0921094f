"""Checks and speed measurements for a machine with a GPU: see ``python -m tests.gpu --help``."""
