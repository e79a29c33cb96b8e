"""Check an installed wheel: it needs no development tools, and it has its version and the records.

With names of notebooks, check that these ran without the repository and found the records of the package.
"""

import importlib.metadata as meta
import importlib.util
import json
import sys
from pathlib import Path


FROM_RECORDS = {"31_table1.ipynb": "A small study", "41_inside.ipynb": "Mean impurity with cross-entropy"}


def check_package():
    assert importlib.util.find_spec("nbdev") is None, "nbdev must not be needed"
    import gini_loss

    for name in ("fastai", "torchvision", "pandas"):
        assert name not in sys.modules, f"import gini_loss must need torch alone, but imported {name}"
    assert gini_loss.__version__ == meta.version("gini_loss")
    folder = Path(gini_loss.__file__).parent / "records"
    assert any(folder.rglob("*.json")), "the records of training runs must come with the package"
    print("gini_loss", gini_loss.__version__, {name: meta.version(name) for name in ("torch", "fastai", "fastcore")})


def check_notebook(path):
    outputs = [o for cell in json.loads(path.read_text())["cells"] for o in cell.get("outputs", [])]
    assert outputs and not any(o["output_type"] == "error" for o in outputs), f"{path} did not run"
    words = FROM_RECORDS.get(path.name, "")
    assert words in json.dumps(outputs), f"{path} did not find the records that came with the package"


def main():
    paths = [Path(name) for name in sys.argv[1:]]
    if not paths:
        check_package()
        return
    for path in paths:
        check_notebook(path)
    print("ran", *[path.name for path in paths])


if __name__ == "__main__":
    main()
