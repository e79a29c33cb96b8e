"Packaging for gini_loss. All metadata is read from settings.ini, the one place where it is written."

import re
from configparser import ConfigParser
from pathlib import Path
from shutil import copytree

from setuptools import find_namespace_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]

LICENSES = {"apache2": "Apache-2.0"}
STATUSES = {"3": "3 - Alpha", "4": "4 - Beta", "5": "5 - Production/Stable"}
EXTRAS = ["fastai", "plots", "replication", "all", "dev"]
# Folders of the repository that come with the package, and their names there: records of runs and of benchmarks, and
# the script of the figures to drag
COPIED = {"results": "records", "benchmarks/results": "benchmarks", "nbs/widgets": "scripts"}

# The links of README.md that are relative: images in Markdown or HTML, then links that are not images.
IMAGE = re.compile(r"(!\[[^\]]*\]\(|<img\b[^>]*?\bsrc=[\"'])(?!\w+:|#|/)")
LINK = re.compile(r"((?<!!)\[[^\]]*\]\()(?!\w+:|#|/)")
CODE_BLOCK = re.compile(r"(^```.*?^```$)", re.M | re.S)


def absolute_links(text):
    "Relative images and links lead into the repository on GitHub"
    place = f"{cfg['user']}/{cfg['repo']}"
    text = IMAGE.sub(rf"\g<1>https://raw.githubusercontent.com/{place}/{cfg['branch']}/", text)
    return LINK.sub(rf"\g<1>https://github.com/{place}/blob/{cfg['branch']}/", text)


def readme():
    "README.md for the page on PyPI, which has no images beside it; blocks of code stay as they are"
    parts = CODE_BLOCK.split((here / "README.md").read_text(encoding="utf-8"))
    return "".join(part if part.startswith("```") else absolute_links(part) for part in parts)


def classifiers():
    versions = cfg["python_versions"].split()
    return [
        f"Development Status :: {STATUSES[cfg['status']]}",
        f"Intended Audience :: {cfg['audience']}",
        f"Natural Language :: {cfg['language']}",
        "Programming Language :: Python :: 3",
        *[f"Programming Language :: Python :: {version}" for version in versions],
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ]


class BuildWithRecords(build_py):
    "Copies what the package reads from the repository; an editable installation reads it there"

    def run(self):
        super().run()
        if self.editable_mode:
            return
        package = Path(self.build_lib) / cfg["lib_path"]
        for folder, name in COPIED.items():
            if (here / folder).is_dir():
                copytree(here / folder, package / name, dirs_exist_ok=True)


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=readme(),
    long_description_content_type="text/markdown",
    url=cfg["git_url"],
    project_urls={
        "Documentation": cfg["doc_host"] + cfg["doc_baseurl"],
        "Source": cfg["git_url"],
        "Issues": cfg["git_url"] + "/issues",
        "Changelog": f"{cfg['git_url']}/blob/{cfg['branch']}/CHANGELOG.md",
    },
    author=cfg["author"],
    author_email=cfg["author_email"],
    license=LICENSES[cfg["license"]],
    keywords=cfg["keywords"].split(),
    classifiers=classifiers(),
    python_requires=">=" + cfg["min_python"],
    install_requires=cfg["requirements"].split(),
    extras_require={name: cfg[f"{name}_requirements"].split() for name in EXTRAS},
    packages=find_namespace_packages(include=["gini_loss", "gini_loss.studies"]),
    package_data={"gini_loss": ["py.typed"], "gini_loss.studies": ["*.ini"]},
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": [f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"],
    },
    cmdclass={"build_py": BuildWithRecords},
    zip_safe=False,
)
