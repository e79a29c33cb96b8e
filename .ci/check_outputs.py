"""Run the pages again whose stored outputs are facts about the repository, and compare.

These pages read signatures, lists of files, steps and studies from the tree when their cells run, so a stored output
goes out of date without an error. Numbers with a decimal point are not compared, because they differ a little between
machines, and neither are figures. Two pages run at a time. Nothing is written; the exit status is 1 if anything
differs.
"""

import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor

import nbformat
from common import root, text
from nbclient import NotebookClient

PAGES = ["51_robustness.ipynb", "60_api.ipynb", "70_contributing.ipynb"]


def facts(cell):
    "The text of a cell's outputs, without what may differ between machines"
    found = []
    for o in cell.get("outputs", []):
        data = o.get("data", {})
        if o.get("name") == "stderr" or "image/png" in data:
            continue
        found.append(text(o.get("text")) or text(data.get("text/markdown")) or text(data.get("text/plain")))
    plain = re.sub(r"-?\d+\.\d*(?:e[+-]?\d+)?|\b\d+e[+-]?\d+\b", "#", "\n".join(found))
    plain = re.sub(r"\.py#L\d+", ".py", plain)
    return [" ".join(line.split()) for line in plain.splitlines() if line.strip()]


def difference(old, new):
    "The first line in which two outputs differ, or None"
    for k in range(max(len(old), len(new))):
        a, b = (lines[k] if k < len(lines) else "nothing" for lines in (old, new))
        if a != b:
            return a, b
    return None


def compare(name):
    "Run a page again: describe each cell whose output is not the stored one, and return the seconds that it took"
    start, wrong = time.time(), []
    path = root / "nbs" / name
    nb = nbformat.read(path, 4)
    stored = [facts(c) for c in nb.cells]
    where = dict(metadata=dict(path=str(path.parent)))
    NotebookClient(nb, timeout=600, kernel_name="python3", resources=where).execute()
    for i, (c, old) in enumerate(zip(nb.cells, stored)):
        found = difference(old, facts(c)) if c.cell_type == "code" else None
        if found:
            wrong.append(f"nbs/{name}, cell {i}: stored, then new\n    {found[0][:300]}\n    {found[1][:300]}")
    return wrong, time.time() - start


def main():
    wrong = []
    with ProcessPoolExecutor(2) as pool:
        for name, (found, seconds) in zip(PAGES, pool.map(compare, PAGES)):
            wrong += found
            print(f"{name} ran in {seconds:.0f} s", flush=True)
    print("\n".join(wrong) or "the stored outputs are what the repository says")
    sys.exit("run these pages again, then make prepare" if wrong else 0)


if __name__ == "__main__":
    main()
