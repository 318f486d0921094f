"""Models as files for devices, and how fast models are."""
