"""Write the first code cell of each notebook, which installs the package in Colab: from the index, or from the
repository if the index does not have it, with the extras and the other packages that the page's imports need.

With names of notebooks, only those are written; `--check` lists the notebooks that are out of date.
"""

import json
import re
import sys

from common import as_json, cfg, root, text

ADDRESS = f"git+https://github.com/{cfg['user']}/{cfg['repo']}"
INSTALLS = 'importlib.util.find_spec("gini_loss")'
NEEDS = {
    "fastai": r"^(?:from|import) (?:fastai|fastcore)\b|gini_loss\.callback",
    "plots": r"^(?:from|import) (?:matplotlib|seaborn|pandas|numpy)\b|gini_loss\.plots",
    "replication": r"^(?:from|import) (?:torchvision|scipy|sklearn|PIL)\b|gini_loss\.(?:datasets|loader|models|rivals|checkpoint|train|study|records|paper|stats|demo|config)\b",
}
OTHERS = {
    "lightning": "lightning",
    "transformers": "transformers accelerate",
    "accelerate": "accelerate",
    "timm": "timm",
    "nbdev": "'nbdev>=2.4.14,<3' 'execnb<0.2' 'fastcore<2'",
}


def code_of(all_cells):
    return "\n".join(text(c["source"]) for c in all_cells if c["cell_type"] == "code")


def extras(code):
    "The extras that the imports of a page need; `all` if these are all three"
    if "from gini_loss.api import" in code:
        return ["all"]
    found = [name for name, pattern in NEEDS.items() if re.search(pattern, code, re.M)]
    return ["all"] if len(found) == len(NEEDS) else found


def install_cell(all_cells):
    code = code_of(all_cells)
    wanted = cfg["lib_name"] + (f"[{','.join(found)}]" if (found := extras(code)) else "")
    others = "".join(
        f" {names}" for name, names in OTHERS.items() if re.search(rf"^(?:from|import) {name}\b", code, re.M)
    )
    return f'''#| hide
import importlib.util
if importlib.util.find_spec("gini_loss") is None:
    wanted, address = "{wanted}", "{ADDRESS}"
    get_ipython().system(f"pip install -q '{{wanted}}'{others} || pip install -q '{{wanted}} @ {{address}}'{others}")'''


def main():
    stale = []
    chosen = [name for name in sys.argv[1:] if not name.startswith("-")]
    for path in sorted((root / "nbs").glob("*.ipynb")):
        if chosen and path.name not in chosen:
            continue
        notebook = json.loads(path.read_text(encoding="utf-8"))
        cells = notebook["cells"]
        cell = next((c for c in cells[:5] if INSTALLS in text(c["source"])), None)
        if cell is None:
            cell = {
                "cell_type": "code",
                "execution_count": None,
                "id": "install",
                "metadata": {},
                "outputs": [],
                "source": [],
            }
            cells.insert(2, cell)
        now = install_cell(cells)
        if text(cell["source"]) == now:
            continue
        stale.append(path.name)
        if "--check" in sys.argv:
            continue
        cell["source"] = now.splitlines(keepends=True)
        path.write_text(as_json(notebook), encoding="utf-8")
    if "--check" in sys.argv and stale:
        sys.exit(f"out of date: {', '.join(stale)}; run `python .ci/colab.py`")
    print("install cells:", ", ".join(stale) + " written" if stale else "up to date")


if __name__ == "__main__":
    main()
