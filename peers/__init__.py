"""vit.py's model written by hand in one framework alone: the yardstick for its speed."""
