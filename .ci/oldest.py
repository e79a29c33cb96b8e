"""The oldest versions that settings.ini allows, as pins: `torch>=2.6` becomes `torch==2.6.*`.

torchvision is left to fastai: the version that settings.ini asks for is for one download, and wants a newer torch than
the oldest.
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
