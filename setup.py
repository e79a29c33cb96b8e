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

licenses = {"apache2": "Apache-2.0"}
statuses = ["0", "1 - Planning", "2 - Pre-Alpha", "3 - Alpha", "4 - Beta", "5 - Production/Stable"]
license_id = licenses[cfg["license"]]


def readme():
    "README.md for the package's page, which has no images beside it: links into the repository get its address"
    raw, source = (f"https://{host}/{cfg['user']}/{cfg['repo']}/{kind}{cfg['branch']}/" for host, kind in (("raw.githubusercontent.com", ""), ("github.com", "blob/")))
    def absolute(text):
        text = re.sub(r"(!\[[^\]]*\]\(|<img\b[^>]*?\bsrc=[\"'])(?!\w+:|#|/)", rf"\g<1>{raw}", text)
        return re.sub(r"((?<!!)\[[^\]]*\]\()(?!\w+:|#|/)", rf"\g<1>{source}", text)
    parts = re.split(r"(^```.*?^```$)", (here / "README.md").read_text(encoding="utf-8"), flags=re.M | re.S)      # code stays as it is
    return "".join(part if part.startswith("```") else absolute(part) for part in parts)


class with_records(build_py):
    "The committed records of training runs and of benchmarks, and the script of the figures to drag, come with the package; an editable installation reads them in the checkout"
    def run(self):
        super().run()
        for folder, name in (("results", "records"), ("benchmarks/results", "benchmarks"), ("nbs/widgets", "scripts")):
            if not self.editable_mode and (here / folder).is_dir():
                copytree(here / folder, Path(self.build_lib) / cfg["lib_path"] / name, dirs_exist_ok=True)


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=readme(),
    long_description_content_type="text/markdown",
    url=cfg["git_url"],
    project_urls={"Documentation": cfg["doc_host"] + cfg["doc_baseurl"], "Source": cfg["git_url"],
                  "Issues": cfg["git_url"] + "/issues"},
    author=cfg["author"],
    author_email=cfg["author_email"],
    license=license_id,
    keywords=cfg["keywords"].split(),
    classifiers=[f"Development Status :: {statuses[int(cfg['status'])]}", "Intended Audience :: " + cfg["audience"],
                 "Natural Language :: " + cfg["language"], "Programming Language :: Python :: 3",
                 "Topic :: Scientific/Engineering :: Artificial Intelligence"],
    python_requires=">=" + cfg["min_python"],
    install_requires=cfg["requirements"].split(),
    extras_require={"dev": cfg["dev_requirements"].split()},
    packages=find_namespace_packages(include=["gini_loss", "gini_loss.studies"]),
    package_data={"gini_loss": ["py.typed"], "gini_loss.studies": ["*.ini"]},
    entry_points={"console_scripts": cfg.get("console_scripts", "").split(),
                  "nbdev": [f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"]},
    cmdclass={"build_py": with_records},
    zip_safe=False,
)
