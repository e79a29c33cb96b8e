"Shared by the scripts here: the repository's root, settings.ini, the cells and the title of a notebook, its page."

import json
import re
from configparser import ConfigParser
from pathlib import Path

root = Path(__file__).resolve().parent.parent
config = ConfigParser(delimiters=["="])
config.read(root / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
site = cfg["doc_host"] + cfg["doc_baseurl"]


def text(x):
    return "".join(x) if isinstance(x, list) else x or ""


def cells(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))["cells"]


def as_json(notebook):
    "The text of a notebook's file, as `nbdev_clean` leaves it"
    return json.dumps(notebook, sort_keys=True, indent=1, ensure_ascii=False) + "\n"


def title_and_subtitle(path):
    "The title and the subtitle of a notebook, without the marks of Markdown"
    first = text(cells(path)[0]["source"])
    return re.search(r"^# (.+)", first, re.M).group(1).strip(), re.search(r"^> (.+)", first, re.M).group(1).strip()


def page(name):
    return re.sub(r"^\d+[a-zA-Z0-9]*_", "", Path(name).stem.lower()) + ".html"
