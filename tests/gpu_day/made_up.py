"""Made-up wheels, and a tree whose parts are stand-ins."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

from tools.gpu.needs import ROOT

__all__ = ["make_tree", "make_wheel"]

STAND_IN = """
import json, os, signal, socket, subprocess, sys, time
from pathlib import Path

NUMBER = {number}
out = Path(sys.argv[sys.argv.index("--out" if NUMBER != 2 else "--gpu-report") + 1])
file = out / "3-train.json" if NUMBER == 3 else out
seen = {{"words": sys.argv[1:], "folder": os.getcwd(), "path": sys.path, "offline": os.environ.get("HF_HUB_OFFLINE")}}
try:
    socket.socket(type=socket.SOCK_DGRAM).connect(("192.0.2.1", 9))
    seen["blocked"] = False
except OSError:
    seen["blocked"] = True
fault = json.loads(os.environ.get("FAULTS", "{{}}")).get(str(NUMBER))
print(f"stand-in {{NUMBER}} runs", flush=True)
if fault == "half":
    file.write_text('{{"half": [1, 2')
    os.kill(os.getpid(), signal.SIGKILL)
if fault == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if fault in ("hang", "deaf"):
    file.with_name("pid").write_text(str(os.getpid()))
    subprocess.Popen(["sleep", "5"], start_new_session=True)
    time.sleep(1200)
if fault != "silent":
    file.write_text(json.dumps({{"seen": seen, "figure": NUMBER / 2}}))
    if NUMBER == 3:
        (out / "before_after.png").write_bytes(b"png")
print("last words without an end of line", end="", flush=True)
sys.exit(3 if fault == "fail" else 0)
"""
"""A module in place of a part; FAULTS, JSON by the part's number, makes it fail."""
PLACES = ("tools/gpu/machine.py", "pytest.py", "tools/gpu/train.py", "tools/gpu/sizes.py", "benchmarks/__main__.py")


def make_tree(folder: Path) -> Path:
    """The tools of a day in a tree of their own, where each part is a stand-in; returns ``day.sh``."""
    kept = shutil.ignore_patterns("wheels", ".site", "__pycache__")
    shutil.copytree(ROOT / "tools", folder / "tools", ignore=kept)
    shutil.copy2(ROOT / "pyproject.toml", folder)
    for number, place in enumerate(PLACES, 1):
        (folder / place).parent.mkdir(exist_ok=True)
        (folder / place).write_text(STAND_IN.format(number=number))
    return folder / "tools" / "gpu" / "day.sh"


def make_wheel(
    folder: Path, name: str, version: str, requires: tuple[str, ...] = (), tag: str = "py3-none-any", padding: int = 0
) -> Path:
    """A wheel of one module, whose ``VERSION`` is the version."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{version}-{tag}.whl"
    info = f"{name}-{version}.dist-info"
    head = [
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}",
        *(f"Requires-Dist: {line}" for line in requires),
    ]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}.py", f"VERSION = {version!r}\n" + "#" * padding)
        archive.writestr(f"{info}/METADATA", "\n".join(head) + "\n\ndescription\n")
        archive.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
        archive.writestr(f"{info}/RECORD", "")
    return path
