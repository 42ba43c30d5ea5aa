"""Tables, plots and progress displays."""
