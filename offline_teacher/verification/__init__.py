"""``verify`` and ``inspect``: checks a store and repairs it; shows a sample."""
