"""Tasks: their official files or rows of the hub, checked."""
