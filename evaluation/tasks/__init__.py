"""Tasks: their definitions, and readers that check their official files, hub datasets or a user's files."""
