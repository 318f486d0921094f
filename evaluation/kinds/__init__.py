"""What tasks of one form share: how to encode examples, train on them, decide and score. See ``kind``."""
