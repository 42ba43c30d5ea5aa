"""Tables, plots and progress for people to read."""
