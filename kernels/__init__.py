"""The kernels of relay_fast, installed and imported as `relay_fast.kernels`.

In a checkout this folder can also be found as a top-level `kernels`, a name that other libraries
probe for (transformers looks for Hugging Face's package and reads its version). Nothing is exported
here and nothing raises, so that they find version 0 and go on; `relay_fast.kernels` modules are
imported one by one.
"""

__version__ = "0"
