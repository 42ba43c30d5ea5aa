"""Generation: chains of a looped model, autoregressive decoding and its key/value cache."""
