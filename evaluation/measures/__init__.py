"""From predictions to scores, and how sure they are."""
