"""Models to evaluate: those of a recipe with their references, and others by directory, URL or hub name."""
