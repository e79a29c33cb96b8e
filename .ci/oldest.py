"""Print the oldest versions that settings.ini allows, as pins: `torch>=2.6` becomes `torch==2.6.*`.

torchvision has no pin: settings.ini requires a newer version for one download, which needs a newer torch than the
oldest.
"""

import re

from common import cfg

requirements = []
for name in ("requirements", "plots_requirements", "replication_requirements"):
    requirements += cfg[name].split()
for requirement in dict.fromkeys(requirements):
    name, version = re.match(r"([\w-]+)>=([\d.]+)", requirement).groups()
    if name == "torchvision":
        continue
    print(f"{name}=={version}" + (".*" if version.count(".") < 2 else ""))
