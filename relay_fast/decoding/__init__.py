"""What models write: chains of a looped model, autoregressive decoding, their caches."""
