"The installed package: the files of the wheel, its requirements, its types, its pages"

import ast
import inspect
import json
import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from configparser import ConfigParser
from importlib import import_module
from pathlib import Path
from shutil import copy2, copytree, ignore_patterns

import pytest

root = Path(__file__).resolve().parent.parent
modules = sorted(path for path in (root / 'gini_loss').glob('*.py') if path.stem != '_modidx')
FILES = [
    'settings.ini',
    'setup.py',
    'pyproject.toml',
    'MANIFEST.in',
    'README.md',
    'LICENSE',
    'CHANGELOG.md',
    '_quarto.yml',
]
FOLDERS = ['gini_loss', 'nbs', 'tests', 'results', 'benchmarks', '.ci', '.github']


def settings():
    config = ConfigParser(delimiters=['='])
    config.read(root / 'settings.ini', encoding='utf-8')
    return config['DEFAULT']


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    "The wheel and the sdist, built by the backend that pip calls, from a copy of the files it reads"
    tree, out = tmp_path_factory.mktemp('source'), tmp_path_factory.mktemp('built')
    for name in FILES:
        copy2(root / name, tree)
    for name in FOLDERS:
        copytree(root / name, tree / name, ignore=ignore_patterns('__pycache__', '.*'))
    code = f"from setuptools import build_meta as b; b.build_wheel({str(out)!r}); b.build_sdist({str(out)!r})"
    done = subprocess.run([sys.executable, '-c', code], cwd=tree, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.fixture(scope='module')
def wheel(built):
    return next(built.glob('*.whl'))


def read_member(wheel, end):
    "The text of the file of the wheel whose name ends with `end`"
    archive = zipfile.ZipFile(wheel)
    return archive.read(next(name for name in archive.namelist() if name.endswith(end))).decode()


# --- files


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = {n for n in zipfile.ZipFile(wheel).namelist() if not n.endswith('/')}
    package = {n for n in names if '.dist-info/' not in n}
    copied = {
        folder: {n for n in package if n.startswith(f'gini_loss/{folder}/')}
        for folder in ('records', 'benchmarks', 'scripts')
    }
    patterns = ('*.py', 'py.typed', 'studies/*.ini')
    expected = {p.relative_to(root).as_posix() for pattern in patterns for p in (root / 'gini_loss').glob(pattern)}
    assert package - set().union(*copied.values()) == expected
    measured = {f'gini_loss/benchmarks/{p.name}' for p in (root / 'benchmarks' / 'results').glob('*.json')}
    assert copied['benchmarks'] == measured and measured
    assert all(re.fullmatch(r'gini_loss/records/[\w./-]+\.(json|npz|csv|md)', n) for n in copied['records'])
    assert all(n.endswith('.js') for n in copied['scripts'])
    info = {n.split('.dist-info/')[1] for n in names - package}
    assert {'METADATA', 'WHEEL', 'RECORD', 'entry_points.txt'} <= info and any(n.endswith('LICENSE') for n in info)


def test_the_sdist_holds_the_notebooks_and_what_setup_and_the_tests_read(built):
    archive = tarfile.open(next(built.glob('*.tar.gz')))
    names = {name.split('/', 1)[1] for name in archive.getnames() if '/' in name}
    notebooks = {f'nbs/{path.name}' for path in (root / 'nbs').glob('*.ipynb')}
    assert notebooks <= names and {'settings.ini', 'CHANGELOG.md', '_quarto.yml'} <= names
    assert {'.ci/common.py', '.github/workflows/test.yml'} <= names
    assert {f'tests/{path.name}' for path in (root / 'tests').glob('*.py')} <= names
    assert not [name for name in names if '__pycache__' in name or name.endswith('.pyc')]


# --- requirements


def requirements(wheel):
    "The names of the required packages, by extra; '' is the core"
    found = {}
    for line in re.findall(r'^Requires-Dist: (.+)$', read_member(wheel, 'METADATA'), re.M):
        extra = re.search(r'extra == ["\'](\w+)', line)
        found.setdefault(extra[1] if extra else '', set()).add(re.match(r'[\w-]+', line).group().lower())
    return found


def test_the_core_needs_torch_alone_and_each_extra_has_its_packages(wheel):
    needs = requirements(wheel)
    assert needs[''] == {'torch'}
    assert needs['fastai'] == {'fastai'}
    assert {'matplotlib', 'seaborn', 'numpy', 'pandas'} <= needs['plots']
    assert (
        needs['fastai'] < needs['replication']
        and {'torchvision', 'scipy', 'filelock', 'safetensors'} <= needs['replication']
    )
    assert needs['plots'] | needs['replication'] | {'jupyter'} == needs['all']
    assert needs['all'] < needs['dev'] and {'nbdev', 'pytest', 'ruff', 'mypy'} <= needs['dev'] - needs['all']


def test_floors_of_what_is_known_to_break_below(wheel):
    metadata = read_member(wheel, 'METADATA')
    floors = dict(re.findall(r'^Requires-Dist: (\w+)>=([\d.]+)', metadata, re.M))
    version = {name: tuple(map(int, floor.split('.'))) for name, floor in floors.items()}
    assert version['torchvision'] >= (0, 24) and version['timm'] >= (1, 0, 31)


def test_the_versions_of_python_are_named(wheel):
    named = set(
        re.findall(r'^Classifier: Programming Language :: Python :: (3\.\d+)$', read_member(wheel, 'METADATA'), re.M)
    )
    tested = set(
        re.findall(
            r'"(3\.\d+)"', re.search(r'python: \[.*\]', (root / '.github/workflows/test.yml').read_text()).group()
        )
    )
    assert named == tested == set(settings()['python_versions'].split()) and settings()['min_python'] in named


def test_the_wheel_installs_all_commands(wheel):
    assert {'gini_demo', 'gini_train', 'gini_study'} <= set(
        re.findall(r'^(gini_\w+) *=', read_member(wheel, 'entry_points.txt'), re.M)
    )


IMPORT_NAMES = {'pillow': 'PIL', 'scikit-learn': 'sklearn'}


def imported_packages(path):
    "The packages outside the standard library that a module imports anywhere"
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split('.')[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.split('.')[0])
    return found - set(sys.stdlib_module_names) - {'gini_loss'}


# Needed only by an option; if the package is missing, an error says so
OPTIONAL = {
    'matplotlib_inline',
    'tensorboard',
    'wandb',
    'pytorch_metric_learning',
    'timm',
    'IPython',
    'nbdev',
    'sentencepiece',
}


@pytest.mark.parametrize('path', modules, ids=lambda path: path.stem)
def test_what_is_imported_is_declared(path, wheel):
    declared = {
        IMPORT_NAMES.get(name, name) for name in set().union(*(requirements(wheel)[extra] for extra in ('', 'all')))
    }
    declared |= {'fastcore', 'fastprogress'}  # fastai's own
    assert imported_packages(path) - declared - OPTIONAL == set()


def run_without(packages, code):
    "The output of `code` in a new interpreter that cannot import `packages`"
    hidden = f"import sys; sys.modules.update(dict.fromkeys({list(packages)!r}))"
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', f'{hidden}\n{code}'],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=root,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# without numpy and filelock, which torch itself imports if they are installed
EXTRAS_ONLY = [
    'fastai',
    'fastcore',
    'torchvision',
    'pandas',
    'matplotlib',
    'seaborn',
    'scipy',
    'sklearn',
    'PIL',
    'safetensors',
]


def test_import_gini_loss_needs_torch_alone():
    code = f"import gini_loss; print([name for name in {EXTRAS_ONLY} if sys.modules[name]])"
    assert run_without(EXTRAS_ONLY, code).strip() == '[]'


def needs_an_extra(path):
    "Whether importing a module needs an extra, not only one of its functions"
    return re.search(r'^(from .*; )?need_extra\(', path.read_text(encoding='utf-8'), re.M) is not None


@pytest.fixture(scope='module')
def messages_without_extras():
    "The error of importing each module without the extras, by the name of the module"
    names = ['callback', *(path.stem for path in modules if needs_an_extra(path))]
    code = f"""import importlib, json
said = {{}}
for name in {names}:
    try: importlib.import_module('gini_loss.' + name)
    except ImportError as e: said[name] = str(e)
print(json.dumps(said))"""
    said = json.loads(run_without(EXTRAS_ONLY, code))
    assert set(said) == set(names)
    return said


def test_a_missing_extra_answers_with_the_command_that_installs_it(messages_without_extras):
    assert len(messages_without_extras) > 10
    for name, message in messages_without_extras.items():
        assert re.search(r"pip install 'gini_loss\[(fastai|plots|replication|all)\]'", message), (name, message)


# --- page on PyPI


def test_the_page_on_pypi_shows_the_figures_of_the_readme(wheel):
    page, readme = read_member(wheel, 'METADATA'), (root / 'README.md').read_text(encoding='utf-8')
    here, there = (re.findall(r'!\[[^\]]*\]\(([^)\s]+)\)', text) for text in (readme, page))
    own = [image for image in here if '://' not in image]
    cfg = settings()
    raw = f"https://raw.githubusercontent.com/{cfg['user']}/{cfg['repo']}/{cfg['branch']}/"
    assert own and len(here) == len(there) and {raw + image for image in own} <= set(there)
    assert all((root / image.removeprefix(raw)).is_file() for image in there if image.startswith(raw))
    relative = re.findall(r'\]\((?!\w+:|#)[^)]*\)|<img\b[^>]*src=["\'](?!\w+:)', page)
    assert not relative, "a link that leads nowhere outside the repository"


# --- types

TORCH = {  # torch as far as the script below needs it: its own stubs take half a minute to read
    '__init__.pyi': "from typing import Any\nfrom . import nn as nn\nclass Tensor: ...\ndef __getattr__(name: str) -> Any: ...\n",
    'nn/__init__.pyi': "from typing import Any\nclass Module:\n    def __call__(self, *args: Any) -> Any: ...\n    def __getattr__(self, name: str) -> Any: ...\ndef __getattr__(name: str) -> Any: ...\n",
}


def see_types(wheel, folder, script):
    "The output of mypy for a user's script with the wheel installed"
    venv.create(folder / 'env', with_pip=False)
    python = folder / 'env' / ('Scripts/python.exe' if os.name == 'nt' else 'bin/python')
    where = subprocess.run(
        [python, '-c', "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    zipfile.ZipFile(wheel).extractall(where)
    for name, text in TORCH.items():
        (folder / 'stubs' / 'torch' / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / 'stubs' / 'torch' / name).write_text(text)
    (folder / 'user.py').write_text(script)
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'} | dict(MYPYPATH=str(folder / 'stubs'))
    done = subprocess.run(
        [
            sys.executable,
            '-m',
            'mypy',
            '--config-file=',
            '--cache-dir',
            str(folder / 'cache'),
            '--python-executable',
            str(python),
            'user.py',
        ],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode in (0, 1), done.stderr
    return re.sub(r'\btorch\._tensor\.Tensor', 'torch.Tensor', done.stdout)


def test_a_user_sees_types(wheel, tmp_path):
    said = see_types(
        wheel,
        tmp_path,
        '''
import torch
from gini_loss import FeatureTap, GiniKLLoss
def step(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
    aux = GiniKLLoss(lambda_gini=0.5)
    with FeatureTap(model, 'layer4') as tap:
        model(x)
        A = tap.pop()
        reveal_type(A)
        reveal_type(aux(A, y))
        reveal_type(aux.terms(A, y))
    GiniKLLoss(lambda_giny=0.5)
    FeatureTap(model, 4)
''',
    )
    assert 'py.typed' not in said, said
    for line in (9, 10):
        assert f'user.py:{line}: note: Revealed type is "torch.Tensor"' in said, said
    assert 'user.py:11: note: Revealed type is "tuple[torch.Tensor, torch.Tensor]"' in said, said
    assert 'user.py:12: error: Unexpected keyword argument "lambda_giny"' in said, said
    assert 'user.py:13: error: Argument 2 to "FeatureTap" has incompatible type "int"' in said, said


def functions(module):
    for name in module.__all__:
        o = getattr(module, name)
        if inspect.isfunction(o):
            yield o
        elif inspect.isclass(o) and not issubclass(o, tuple):
            yield from (
                f
                for k, f in vars(o).items()
                if inspect.isfunction(f)
                and f.__module__ == module.__name__
                and (k == '__init__' or not k.startswith('_'))
                and not (k != '__init__' and o.__name__.endswith('Callback'))
            )  # fastai calls those


@pytest.mark.parametrize('name', [path.stem for path in modules if not path.stem.startswith('_')])
def test_public_functions_are_annotated(name):
    incomplete = []
    for f in functions(import_module(f'gini_loss.{name}')):
        s = inspect.signature(f)
        bare = [p.name for p in s.parameters.values() if p.annotation is p.empty and p.name != 'self']
        if bare or s.return_annotation is s.empty:
            incomplete.append((f.__qualname__, bare or 'return'))
    assert not incomplete


# --- pages


CONTRACT = """pool class_means class_probs gini_impurity feature_histogram label_histogram gini_loss kl_loss GiniKLLoss pull
RunningGiniKLLoss GiniLossCallback FeatureTap find_channel_dim explain ablate channels_of name_channels load_cifar100
split_train_valid load_caltech12 cifar100_dls DeviceLoader device_dls resnet17 resnet18 resnet50 cvt7 Config recipe train
load_run load_results load_study run_study compare_arms""".split()


def test_every_name_of_the_contract_has_an_entry_with_an_example():
    followed = {}
    for path in sorted((root / 'nbs').glob('60_api_*.ipynb')):
        name = None
        for cell in json.loads(path.read_text(encoding='utf-8'))['cells']:
            source = ''.join(cell['source'])
            if entry := re.search(r'^show_doc\(\w+\.(\w+), title_level=0\)', source, re.M):
                name = entry.group(1)
                assert cell['outputs'], f'the entry of {name} is empty'
            elif name is not None:
                ran = cell['cell_type'] == 'code' and bool(cell['outputs'])
                followed.setdefault(name, []).append(source if ran or '```python' in source else '')
    for name in CONTRACT:
        found = followed.get(name, [])
        assert any(re.search(rf'\b{name}\b', source) for source in found), f'no example for {name}'


def luminance(color):
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
        for c in (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a, b):
    "WCAG 2: (brighter + 0.05) / (darker + 0.05), from 1 to 21"
    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


# the colours of Quarto's default highlighting, the styles arrow-light and arrow-dark
HIGHLIGHTING = dict(
    light='#003b4f #00769e #111111 #20794d #4758ab #5e5e5e #657422 #8f5902 #ad0000',
    dark='#00e0e0 #abe338 #d4d0ab #dcc6e0 #f07178 #f8f8f2 #ffa07a #ffd700',
)


def test_contrast_is_what_wcag_says():
    assert contrast('#000000', '#ffffff') == pytest.approx(21) and contrast('#777777', '#ffffff') == pytest.approx(
        4.48, abs=0.005
    )


@pytest.mark.parametrize('mode', ['light', 'dark'])
def test_text_links_and_code_stand_out(mode):
    theme = dict(re.findall(r'^\$([\w-]+): (#[0-9a-f]{6});$', (root / 'nbs' / f'theme-{mode}.scss').read_text(), re.M))
    grounds = {
        'body-bg': ('body-color', 'text-muted', 'link-color'),
        'code-bg': ('code-color', 'link-color'),
        'code-block-bg': ('body-color', 'code-comment'),
    }
    pairs = {(name, ground): theme[name] for ground, names in grounds.items() for name in names}
    pairs |= {(color, 'code-block-bg'): color for color in HIGHLIGHTING[mode].split()}
    low = {
        pair: round(contrast(color, theme[pair[1]]), 2)
        for pair, color in pairs.items()
        if contrast(color, theme[pair[1]]) < 4.5
    }
    assert not low


def test_the_card_has_the_size_that_sites_expect():
    head = (root / 'nbs' / 'images' / 'card.png').read_bytes()[:24]
    assert head[1:4] == b'PNG' and (int.from_bytes(head[16:20], 'big'), int.from_bytes(head[20:24], 'big')) == (
        1200,
        630,
    )
    assert 'images/card.png' in (root / '_quarto.yml').read_text()
