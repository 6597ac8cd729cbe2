"""What only developers run: hosts for tests, the miniature's training, and what writes graphs and texts."""
