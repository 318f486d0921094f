"""The contract between teacher and students: a directory that describes and checks itself. See FORMAT.md."""
