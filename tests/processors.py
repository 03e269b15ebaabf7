"""The numeric tests as other processors would compute them: ``make test-processors``.

Libraries that compute for torch (oneDNN, ATen's own kernels, MKL) can be told to use no more than an older processor
has. Each setting that this processor takes is run in a process of its own, as many at a time as there are cores.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

__all__ = ["SETTINGS", "flags", "main"]

HERE = Path(__file__).parent
AT_ONCE = 4
"""Processes at most: each needs more than a gigabyte."""

AVX512 = {"avx512f", "avx512bw", "avx512vl", "avx512dq"}
ONEDNN = {
    "AVX2_VNNI_2": {"avx_vnni", "avx_vnni_int8", "avx_ne_convert"},
    "AVX512_CORE": AVX512,
    "AVX512_CORE_BF16": AVX512 | {"avx512_bf16"},
    "AVX512_CORE_FP16": AVX512 | {"avx512_fp16"},
    "AVX512_CORE_AMX": AVX512 | {"amx_tile", "amx_bf16", "amx_int8"},
    "AVX512_CORE_AMX_FP16": AVX512 | {"amx_fp16"},
}
"""Values of ONEDNN_MAX_CPU_ISA, and the flags of /proc/cpuinfo that each needs. Older kinds are below."""
SETTINGS = [(f"ONEDNN_MAX_CPU_ISA={value}", needs) for value, needs in ONEDNN.items()]
SETTINGS += [
    ("ONEDNN_MAX_CPU_ISA=SSE41 ATEN_CPU_CAPABILITY=default MKL_ENABLE_INSTRUCTIONS=SSE4_2", {"sse4_2"}),
    ("ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2", {"avx2"}),
    ("MKL_CBWR=COMPATIBLE", {"sse4_2"}),
]
"""Environments, and the flags that each needs."""


def flags() -> set[str]:
    """What this processor can do, as Linux names it; nothing where Linux does not say."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((set(line.split(":")[1].split()) for line in lines if line.startswith("flags")), set())


def run(setting: str) -> bool:
    """Run the numeric tests in an environment; print their closing line, and all they said if one fails."""
    environment = dict(pair.split("=") for pair in setting.split())
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "numeric", "-r", "fE"]
    began = time.monotonic()
    ended = subprocess.run(
        [*command, "--durations=0", "--durations-min=60"],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        cwd=HERE.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    closing = (ended.stdout.strip().splitlines() or ["pytest said nothing"])[-1]
    said = f"\n{ended.stdout}{ended.stderr}" if ended.returncode else ""
    print(f"{setting}: {closing} ({time.monotonic() - began:.0f} s){said}", flush=True)
    return ended.returncode == 0


def main() -> int:
    """Returns the exit code: 1 if a test fails in any environment."""
    own = flags()
    taken = [setting for setting, needs in SETTINGS if needs <= own]
    for setting, needs in SETTINGS:
        if not needs <= own:
            print(f"{setting}: not run, this processor lacks {', '.join(sorted(needs - own))}")
    with ThreadPoolExecutor(min(os.cpu_count() or 1, AT_ONCE)) as pool:
        fine = list(pool.map(run, taken))
    print(f"the numeric tests pass in {sum(fine)} of {len(taken)} environments")
    return 0 if all(fine) else 1


if __name__ == "__main__":
    sys.exit(main())
