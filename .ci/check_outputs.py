"""Stored outputs that are facts about the repository: run the pages that hold them again, and compare.

A page's signatures, lists of files, steps and studies are read from the tree when its cells run, and what is stored
goes out of date without an error. Numbers with a decimal point are left out of the comparison, since they differ a
little from machine to machine, and so are figures. Nothing is written; exits with 1 if anything differs.
"""
import re
import sys
import time

import nbformat
from common import root, text
from nbclient import NotebookClient

PAGES = ["51_robustness.ipynb", "60_api.ipynb", "70_contributing.ipynb"]


def facts(cell):
    "The text that a cell has put out, without what may differ between machines"
    found = []
    for o in cell.get("outputs", []):
        data = o.get("data", {})
        if o.get("name") == "stderr" or "image/png" in data: continue
        found.append(text(o.get("text")) or text(data.get("text/markdown")) or text(data.get("text/plain")))
    plain = re.sub(r"-?\d+\.\d*(?:e[+-]?\d+)?|\b\d+e[+-]?\d+\b", "#", "\n".join(found))
    plain = re.sub(r"\.py#L\d+", ".py", plain)
    return [" ".join(line.split()) for line in plain.splitlines() if line.strip()]


def difference(old, new):
    "The first line in which two outputs differ, or None"
    for k in range(max(len(old), len(new))):
        a, b = (lines[k] if k < len(lines) else "nothing" for lines in (old, new))
        if a != b: return a, b
    return None


def compare(name):
    "Run a page again, and describe each cell whose output is not the stored one"
    path = root / "nbs" / name
    nb = nbformat.read(path, 4)
    stored = [facts(c) for c in nb.cells]
    where = dict(metadata=dict(path=str(path.parent)))
    NotebookClient(nb, timeout=600, kernel_name="python3", resources=where).execute()
    for i, (c, old) in enumerate(zip(nb.cells, stored)):
        found = difference(old, facts(c)) if c.cell_type == "code" else None
        if found: yield f"nbs/{name}, cell {i}: stored, then new\n    {found[0][:300]}\n    {found[1][:300]}"


def main():
    wrong = []
    for name in PAGES:
        start = time.time()
        wrong += compare(name)
        print(f"{name} ran in {time.time() - start:.0f} s", flush=True)
    print("\n".join(wrong) or "the stored outputs are what the repository says")
    sys.exit("run these pages again, then make prepare" if wrong else 0)


if __name__ == "__main__": main()
