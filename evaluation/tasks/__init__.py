"""Tasks: reading and checking their official files or the hub's rows."""
