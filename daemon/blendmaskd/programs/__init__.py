"""Programs for people, and what only they share."""
