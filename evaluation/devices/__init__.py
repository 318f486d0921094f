"""Exports models for devices and measures their latency."""
