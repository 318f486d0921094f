"""What only a machine with a GPU can show: see ``python -m tests.gpu --help``."""
