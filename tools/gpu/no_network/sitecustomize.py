"""Found on the path by every Python of a rehearsal where ``unshare`` is not permitted: see ``tools/gpu/network.py``."""

import contextlib
import importlib
import sys
from pathlib import Path

from tools.gpu.network import block

block()

# The interpreter imports one module of this name: pass on to the one that it would have found.
sys.path[:] = [entry for entry in sys.path if Path(entry) != Path(__file__).parent]
this = sys.modules.pop(__name__)
with contextlib.suppress(ModuleNotFoundError):
    importlib.import_module(__name__)
sys.modules.setdefault(__name__, this)
