"""The ops of a layer and of the readout, and the choice of their implementation."""
