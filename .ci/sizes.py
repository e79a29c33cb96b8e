"""Print how many packages and megabytes the core and each extra add to torch, and the seconds of an import, as
Markdown.

Each is installed into a new environment by uv, which must be on the PATH.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from common import root

EXTRAS = ["fastai", "plots", "replication", "all", "dev"]


def megabytes(folder):
    files = [Path(where) / name for where, _, names in os.walk(folder) for name in names]
    return sum(f.stat().st_size for f in files if not f.is_symlink()) / 1e6


def install(folder, requirements):
    "Install into a new environment: the number of its packages and its megabytes"
    subprocess.run(["uv", "venv", "-q", "--python", sys.executable, folder], check=True)
    python = folder / "bin" / "python"
    subprocess.run(["uv", "pip", "install", "-q", "--python", python, "torch", *requirements], cwd=root, check=True)
    names = subprocess.run(
        ["uv", "pip", "list", "-q", "--python", python, "--format", "freeze"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    return len(names), megabytes(next((folder / "lib").glob("python*/site-packages")))


def import_seconds(python, tries=5):
    "Seconds to import torch, and gini_loss after it: the fastest of several new processes"
    imports = "a = now(); import torch; b = now(); import gini_loss; print(b - a, now() - b)"
    code = f"from time import perf_counter as now; {imports}"
    runs = []
    for _ in range(tries):
        done = subprocess.run([python, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True, cwd="/")
        runs.append([float(x) for x in done.stdout.split()])
    return min(runs, key=sum)


def main():
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        base = install(tmp / "torch", [])
        print(f"torch: {base[0]} packages, {base[1]:.0f} MB\n")
        print("| | packages beside torch's | megabytes |\n|---|---:|---:|")
        for name in ["core", *EXTRAS]:
            size = install(tmp / name, ["." if name == "core" else f".[{name}]"])
            print(f"| {name} | {size[0] - base[0]} | {size[1] - base[1]:.1f} |", flush=True)
        python = tmp / "core" / "bin" / "python"
        torch, ours = import_seconds(python)
        print(f"\nimport torch: {torch:.2f} s; import gini_loss after it: {ours:.3f} s, {ours / torch:.1%} of torch's")


if __name__ == "__main__":
    main()
