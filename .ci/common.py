"What the scripts here share: where things are, what settings.ini says, a notebook's title, the address of its page."
import json
import re
from configparser import ConfigParser
from pathlib import Path

root = Path(__file__).resolve().parent.parent
config = ConfigParser(delimiters=["="])
config.read(root / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
site = cfg["doc_host"] + cfg["doc_baseurl"]


def text(x): return "".join(x) if isinstance(x, list) else x or ""


def cells(path): return json.loads(Path(path).read_text(encoding="utf-8"))["cells"]


def title_and_subtitle(path):
    "The two lines that every notebook opens with, without Markdown's marks"
    first = text(cells(path)[0]["source"])
    return re.search(r"^# (.+)", first, re.M).group(1).strip(), re.search(r"^> (.+)", first, re.M).group(1).strip()


def page(name): return re.sub(r"^\d+[a-zA-Z0-9]*_", "", Path(name).stem.lower()) + ".html"
