"""The kernels of relay_fast, installed and imported as `relay_fast.kernels`.

In a checkout this folder is also importable as a top-level `kernels`, a name that other libraries
probe for (transformers looks for Hugging Face's package of that name and its version). Nothing is
exported or raised here, so that they find no version and continue. Import the modules of
`relay_fast.kernels` one by one.
"""

__version__ = "0"
