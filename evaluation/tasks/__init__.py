"""Definition of a task, and readers of official files, hub datasets and a user's files."""
