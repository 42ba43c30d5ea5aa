"""Makes `relay_fast.kernels` importable from a checkout, where its files lie in <root>/kernels/.

An installed package has them inside itself. A checkout does not, and it is what Python finds
whenever it comes first on sys.path (running from the checkout after `pip install .`, PYTHONPATH).
"""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

NAME = "relay_fast.kernels"


def attach_kernels(package: ModuleType) -> None:
    """Load <root>/kernels as `relay_fast.kernels` if `package` (relay_fast) runs from a checkout.

    The checkout's own folder wins over an editable install of another checkout, whose import hook
    would otherwise lend this one its kernels. <root> counts as a checkout only if it holds
    setup.py: in site-packages a folder `kernels` beside relay_fast is somebody else's.
    """
    if NAME in sys.modules:
        return
    inside = Path(package.__file__).resolve().parent
    root = inside.parent
    folder = root / "kernels"
    if (inside / "kernels").is_dir() or not (root / "setup.py").is_file():
        return
    if not (folder / "__init__.py").is_file():
        return
    spec = spec_from_file_location(
        NAME, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = module_from_spec(spec)
    sys.modules[NAME] = module
    spec.loader.exec_module(module)
    package.kernels = module
