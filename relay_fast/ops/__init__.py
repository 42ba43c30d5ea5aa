"""The ops of a layer and of the readout, and which implementation serves them."""
