"""Runs a teacher pass: parts of the text, tasks, manifest; its rates, and the record of a finished pass."""
