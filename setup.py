"""Which folders are packages; everything else is in pyproject.toml.

The folder kernels/ is installed as `relay_fast.kernels`. A top-level package called `kernels` would
overwrite another project's package of that name, so packages are listed and never searched for.
"""

from setuptools import setup

setup(
    packages=[
        "relay_fast",
        "relay_fast.batch",
        "relay_fast.data",
        "relay_fast.decoding",
        "relay_fast.engine",
        "relay_fast.kernels",
        "relay_fast.models",
        "relay_fast.ops",
        "relay_fast.recipes",
        "relay_fast.relay",
        "relay_fast.relay.presets",
        "relay_fast.reporting",
        "relay_fast.tasks",
        "relay_fast.training",
        "relay_fast.utils",
    ],
    package_dir={"relay_fast": "relay_fast", "relay_fast.kernels": "kernels"},
    # An editable install by a .pth file. setuptools' other way, an import hook, comes after the
    # search of sys.path: in the folder that holds a clone called relay_fast, that search takes the
    # clone for an empty namespace package.
    options={"editable_wheel": {"mode": "compat"}},
    package_data={"relay_fast": ["py.typed"], "relay_fast.relay.presets": ["*.toml"]},
)
