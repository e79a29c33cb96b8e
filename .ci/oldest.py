"""The oldest versions that settings.ini allows, as pins for pip: `torch>=2.6` becomes `torch==2.6.*`, `fastai>=2.8.2,<3` becomes `fastai==2.8.2`."""
import re

from common import cfg

for requirement in cfg["requirements"].split():
    name, version = re.fullmatch(r"([\w-]+)>=([\d.]+)(?:,.*)?", requirement).groups()
    print(f"{name}=={version}" + (".*" if version.count(".") < 2 else ""))
