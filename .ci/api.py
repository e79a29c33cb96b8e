"""Write the pages of the API, one notebook per module: an entry for each public name, and below it the examples that
the notebook has there already. Write examples in the notebooks, without headings of the second level; this script changes
only the entries around them.

`--check` lists the pages that are out of date. It does not compare line numbers of the source.
"""

import inspect
import json
import re
import sys

from colab import install_cell
from common import as_json, cells, cfg, root, text

from gini_loss.api import Entry, constants, is_described, overview, public_modules

NBS = root / "nbs"
COLAB = f"https://colab.research.google.com/github/{cfg['user']}/{cfg['repo']}/blob/{cfg['branch']}/nbs"
ENTRY = re.compile(r"^show_doc\(\w+\.(\w+), title_level=0\)", re.M)


def lines(source):
    return source.splitlines(keepends=True)


def markdown_cell(source):
    return {"cell_type": "markdown", "metadata": {}, "source": lines(source)}


def code_cell(source, output=None, plain=""):
    outputs = []
    if output is not None:
        data = {"text/markdown": lines(output), "text/plain": [plain]}
        outputs = [{"data": data, "execution_count": None, "metadata": {}, "output_type": "execute_result"}]
    return {"cell_type": "code", "execution_count": None, "metadata": {}, "outputs": outputs, "source": lines(source)}


def examples(path):
    "The cells below each entry of a page, by the name of the entry; None is for the cells before the first entry"
    found, name = {None: []}, None
    if not path.exists():
        return found
    for cell in cells(path)[4:]:
        source = text(cell["source"])
        if entry := ENTRY.search(source):
            name = entry.group(1)
        elif source.startswith("## ") or "Markdown(constants(" in source:
            continue
        else:
            found.setdefault(name, []).append(cell)
    return found


def told_in(module):
    "Links to the notebooks that a module is exported from"
    names = dict.fromkeys(re.findall(r"^# %% \.\./nbs/(\w+)\.ipynb", inspect.getsource(module), re.M))
    links = [f"[{re.sub(r'^[0-9]+[a-z]?_', '', name).replace('_', ' ')}]({name}.ipynb)" for name in names]
    return ", ".join(links)


def page_cells(module, path):
    short = module.__name__.split(".")[1]
    kept = examples(path)
    doc = (inspect.getdoc(module) or "").strip().split("\n")[0]
    told = told_in(module)
    opening = f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({COLAB}/{path.name})\n\n"
    opening += f"One module of [the API](60_api.ipynb){', told in ' + told if told else ''}."
    needs = (
        f"#| hide\nfrom IPython.display import Markdown\nfrom gini_loss import {short}\n"
        "from gini_loss.api import constants, show_doc"
    )
    out = [markdown_cell(f"# gini_loss.{short}\n\n> {doc}"), markdown_cell(opening), code_cell(needs)]
    out += kept.get(None, [])
    for name in module.__all__:
        symbol = getattr(module, name)
        if not is_described(symbol):
            continue
        entry = Entry(symbol, name, title_level=0)
        out.append(markdown_cell(f"## {name}\n\n{entry.description()}".strip()))
        call = f"#| echo: false\nshow_doc({short}.{name}, title_level=0)"
        out.append(code_cell(call, entry._repr_markdown_(), repr(entry)))
        out += kept.get(name, [])
    if table := constants(module):
        out.append(markdown_cell("## Constants"))
        out.append(
            code_cell(f"#| echo: false\nMarkdown(constants({short}))", table, "<IPython.core.display.Markdown object>")
        )
    out.insert(2, code_cell(install_cell(out)))
    for k, cell in enumerate(out):
        cell["id"] = f"{short[:12]}-{k:03d}"
    return out


def without_lines(all_cells):
    "The content of a page as JSON, without line numbers of the source"
    said = [
        [text(c["source"]), [text(o.get("data", {}).get("text/markdown")) for o in c.get("outputs", [])]]
        for c in all_cells
    ]
    return re.sub(r"\.py#L\d+", ".py", json.dumps(said))


def sidebar(names):
    "The path and the text of _quarto.yml with these pages in its sidebar, below the page of all names"
    path = root / "_quarto.yml"
    kept = [line for line in path.read_text(encoding="utf-8").splitlines() if "href: 60_api_" not in line]
    at = next(k for k, line in enumerate(kept) if "href: 60_api.ipynb" in line)
    indent = kept[at][: len(kept[at]) - len(kept[at].lstrip())]
    kept[at + 1 : at + 1] = [f"{indent}- {{text: {name}, href: 60_api_{name}.ipynb}}" for name in names]
    return path, "\n".join(kept) + "\n"


def first_page():
    "The page of all names, with the current list"
    notebook = json.loads((NBS / "60_api.ipynb").read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        if "Markdown(overview())" not in text(cell["source"]):
            continue
        cell["outputs"] = code_cell("", overview(), "<IPython.core.display.Markdown object>")["outputs"]
    return notebook


def update(path, is_current, content, check):
    "Write a file unless it is current, or with `check` only compare it. Returns whether it was out of date"
    if is_current:
        return False
    if not check:
        path.write_text(content, encoding="utf-8")
    return True


def main():
    check, first = "--check" in sys.argv, first_page()
    wanted, stale = {NBS / "60_api.ipynb": first["cells"]}, []
    for module in public_modules():
        path = NBS / f"60_api_{module.__name__.split('.')[1]}.ipynb"
        wanted[path] = page_cells(module, path)
    for path, now in wanted.items():
        is_current = path.exists() and without_lines(cells(path)) == without_lines(now)
        notebook = {"cells": now, "metadata": first["metadata"], "nbformat": 4, "nbformat_minor": 5}
        if update(path, is_current, as_json(notebook), check):
            stale.append(path.name)
    for path in set(NBS.glob("60_api_*.ipynb")) - set(wanted):
        stale.append(path.name)
        if not check:
            path.unlink()
    path, bar = sidebar([p.stem.removeprefix("60_api_") for p in wanted if p.stem != "60_api"])
    if update(path, bar == path.read_text(encoding="utf-8"), bar, check):
        stale.append(path.name)
    if check and stale:
        sys.exit(f"out of date: {', '.join(stale)}; run `python .ci/api.py`")
    print("the pages of the API:", ", ".join(stale) + " written" if stale else "up to date")


if __name__ == "__main__":
    main()
