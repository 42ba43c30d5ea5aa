"""Files, tensor files, ragged arrays, the cores and the lengths that others build on."""
