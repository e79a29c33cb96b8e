"What a person gets who installs the package, and what they see: the wheel's files, its types, its pages"
import inspect, json, os, re, subprocess, sys, venv, zipfile
from importlib import import_module
from pathlib import Path
from shutil import copy2, copytree, ignore_patterns
import pytest

root = Path(__file__).resolve().parent.parent

@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    "The wheel, built by the backend that pip would call, from a copy of what it reads"
    tree, out = tmp_path_factory.mktemp('source'), tmp_path_factory.mktemp('wheel')
    for name in ('settings.ini', 'setup.py', 'pyproject.toml', 'MANIFEST.in', 'README.md', 'LICENSE'): copy2(root/name, tree)
    for name in ('gini_loss', 'nbs', 'tests', 'results', 'benchmarks'): copytree(root/name, tree/name, ignore=ignore_patterns('__pycache__', '.*'))
    code = f"from setuptools import build_meta; print(build_meta.build_wheel({str(out)!r}))"
    done = subprocess.run([sys.executable, '-c', code], cwd=tree, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return next(out.glob('*.whl'))

# --- files

def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = {n for n in zipfile.ZipFile(wheel).namelist() if not n.endswith('/')}
    package = {n for n in names if '.dist-info/' not in n}
    records = {n for n in package if n.startswith('gini_loss/records/')}
    measured = {n for n in package if n.startswith('gini_loss/benchmarks/')}
    expected = {p.relative_to(root).as_posix() for pattern in ('*.py', 'py.typed', 'studies/*.ini') for p in (root/'gini_loss').glob(pattern)}
    assert package - records - measured == expected
    assert measured == {f'gini_loss/benchmarks/{p.name}' for p in (root/'benchmarks'/'results').glob('*.json')} and measured
    assert all(re.fullmatch(r'gini_loss/records/[\w./-]+\.(json|npz|csv|md)', n) for n in records)
    info = {n.split('.dist-info/')[1] for n in names - package}
    assert {'METADATA', 'WHEEL', 'RECORD', 'entry_points.txt'} <= info and any(n.endswith('LICENSE') for n in info)

def test_the_wheel_installs_all_commands_and_requires_no_development_tools(wheel):
    z = zipfile.ZipFile(wheel)
    read = lambda end: z.read(next(n for n in z.namelist() if n.endswith(end))).decode()
    assert {'gini_demo', 'gini_train', 'gini_study'} <= set(re.findall(r'^(gini_\w+) *=', read('entry_points.txt'), re.M))
    needed = [r for r in re.findall(r'^Requires-Dist: (.+)$', read('METADATA'), re.M) if 'extra ==' not in r]
    assert {'torch', 'fastai'} <= {re.match(r'[\w-]+', r).group() for r in needed}
    assert not [r for r in needed if re.match(r'(nbdev|execnb|pytest|mypy)\b', r)]

def test_the_page_on_pypi_shows_the_figures_of_the_readme(wheel):
    z = zipfile.ZipFile(wheel)
    page = z.read(next(n for n in z.namelist() if n.endswith('METADATA'))).decode()
    here, there = (re.findall(r'!\[[^\]]*\]\(([^)\s]+)\)', text) for text in ((root/'README.md').read_text(encoding='utf-8'), page))
    own = [image for image in here if '://' not in image]
    cfg = dict(re.findall(r'^(user|repo|branch) *= *(\S+)', (root/'settings.ini').read_text(), re.M))
    raw = f"https://raw.githubusercontent.com/{cfg['user']}/{cfg['repo']}/{cfg['branch']}/"
    assert own and len(here) == len(there) and {raw + image for image in own} <= set(there)
    assert all((root/image.removeprefix(raw)).is_file() for image in there if image.startswith(raw))
    assert not re.findall(r'\]\((?!\w+:|#)[^)]*\)|<img\b[^>]*src=["\'](?!\w+:)', page), "a link that leads nowhere outside the repository"

# --- types

TORCH = { # torch as far as the script below needs it: its own stubs take half a minute to read
    '__init__.pyi': "from typing import Any\nfrom . import nn as nn\nclass Tensor: ...\ndef __getattr__(name: str) -> Any: ...\n",
    'nn/__init__.pyi': "from typing import Any\nclass Module:\n    def __call__(self, *args: Any) -> Any: ...\n    def __getattr__(self, name: str) -> Any: ...\ndef __getattr__(name: str) -> Any: ...\n"}

def see_types(wheel, folder, script):
    "What mypy says of a user's script where the wheel is installed"
    venv.create(folder/'env', with_pip=False)
    python = folder/'env'/('Scripts/python.exe' if os.name == 'nt' else 'bin/python')
    where = subprocess.run([python, '-c', "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True, check=True).stdout.strip()
    zipfile.ZipFile(wheel).extractall(where)
    for name, text in TORCH.items():
        (folder/'stubs'/'torch'/name).parent.mkdir(parents=True, exist_ok=True)
        (folder/'stubs'/'torch'/name).write_text(text)
    (folder/'user.py').write_text(script)
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'} | dict(MYPYPATH=str(folder/'stubs'))
    done = subprocess.run([sys.executable, '-m', 'mypy', '--config-file=', '--cache-dir', str(folder/'cache'), '--python-executable', str(python), 'user.py'],
                          cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode in (0, 1), done.stderr
    return re.sub(r'\btorch\._tensor\.Tensor', 'torch.Tensor', done.stdout)

def test_a_user_sees_types(wheel, tmp_path):
    said = see_types(wheel, tmp_path, '''
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
''')
    assert 'py.typed' not in said, said
    for line in (9, 10): assert f'user.py:{line}: note: Revealed type is "torch.Tensor"' in said, said
    assert 'user.py:11: note: Revealed type is "tuple[torch.Tensor, torch.Tensor]"' in said, said
    assert 'user.py:12: error: Unexpected keyword argument "lambda_giny"' in said, said
    assert 'user.py:13: error: Argument 2 to "FeatureTap" has incompatible type "int"' in said, said

def functions(module):
    for name in module.__all__:
        o = getattr(module, name)
        if inspect.isfunction(o): yield o
        elif inspect.isclass(o) and not issubclass(o, tuple):
            yield from (f for k, f in vars(o).items() if inspect.isfunction(f) and f.__module__ == module.__name__ and (k == '__init__' or not k.startswith('_'))
                       and not (k != '__init__' and o.__name__.endswith('Callback'))) # fastai calls those

@pytest.mark.parametrize('name', ['losses', 'running', 'tap', 'callback', 'data', 'models', 'train', 'study', 'report', 'demo', 'results', 'stats', 'plots'])
def test_public_functions_are_annotated(name):
    incomplete = []
    for f in functions(import_module(f'gini_loss.{name}')):
        s = inspect.signature(f)
        bare = [p.name for p in s.parameters.values() if p.annotation is p.empty and p.name != 'self']
        if bare or s.return_annotation is s.empty: incomplete.append((f.__qualname__, bare or 'return'))
    assert not incomplete

# --- pages

def test_the_api_page_shows_every_public_name():
    cells = json.loads((root/'nbs'/'60_api.ipynb').read_text(encoding='utf-8'))['cells']
    outputs = [''.join(o.get('data', {}).get('text/markdown', '')) for c in cells for o in c.get('outputs', [])]
    page = '\n'.join(outputs + [''.join(c['source']) for c in cells if c['cell_type'] == 'markdown'])
    for path in sorted((root/'gini_loss').glob('[a-z]*.py')):
        module = import_module(f'gini_loss.{path.stem}')
        missing = [n for n in module.__all__ if not re.search(rf'^### {n}$|^\| `{n}\b', page, re.M)]
        assert not missing, f"run nbs/60_api.ipynb again: it does not show {missing} of {path.name}"

def test_every_name_of_the_contract_has_an_entry_with_an_example():
    cells, sections, name = json.loads((root/'nbs'/'60_api.ipynb').read_text(encoding='utf-8'))['cells'], {}, None
    for c in cells:
        source = ''.join(c['source'])
        if c['cell_type'] == 'markdown' and (heading := re.search(r'^#{2,3} (\w+)', source)): name = heading.group(1)
        sections.setdefault(name, []).append((c, source))
    contract = next(m.group(1) for c in cells if (m := re.search(r"^CONTRACT = '''([^']+)'''", ''.join(c['source']), re.M))).split()
    assert len(contract) > 25
    for name in contract:
        here = sections.get(name, [])
        assert any(source.startswith('#| echo: false') and f"'{name}'" in source and c['outputs'] for c, source in here), f"no entry for {name}"
        run = any(c['cell_type'] == 'code' and not source.startswith('#|') and re.search(rf'\b{name}\b', source) and c['outputs'] for c, source in here)
        shown = any(c['cell_type'] == 'markdown' and re.search(rf'```python\n[^`]*\b{name}\b', source) for c, source in here)
        assert run or shown, f"no example for {name}"

def luminance(color):
    linear = [c/12.92 if c <= .04045 else ((c + .055)/1.055)**2.4 for c in (int(color[i:i+2], 16)/255 for i in (1, 3, 5))]
    return .2126*linear[0] + .7152*linear[1] + .0722*linear[2]

def contrast(a, b):
    "WCAG 2: (brighter + 0.05) / (darker + 0.05), from 1 to 21"
    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + .05)/(dark + .05)

# the colours of Quarto's default highlighting, the styles arrow-light and arrow-dark
HIGHLIGHTING = dict(light='#003b4f #00769e #111111 #20794d #4758ab #5e5e5e #657422 #8f5902 #ad0000', dark='#00e0e0 #abe338 #d4d0ab #dcc6e0 #f07178 #f8f8f2 #ffa07a #ffd700')

def test_contrast_is_what_wcag_says():
    assert contrast('#000000', '#ffffff') == pytest.approx(21) and contrast('#777777', '#ffffff') == pytest.approx(4.48, abs=.005)

@pytest.mark.parametrize('mode', ['light', 'dark'])
def test_text_links_and_code_stand_out(mode):
    theme = dict(re.findall(r'^\$([\w-]+): (#[0-9a-f]{6});$', (root/'nbs'/f'theme-{mode}.scss').read_text(), re.M))
    grounds = {'body-bg': ('body-color', 'text-muted', 'link-color'), 'code-bg': ('code-color', 'link-color'), 'code-block-bg': ('body-color',)}
    pairs = {(name, ground): theme[name] for ground, names in grounds.items() for name in names}
    pairs |= {(color, 'code-block-bg'): color for color in HIGHLIGHTING[mode].split()}
    low = {pair: round(contrast(color, theme[pair[1]]), 2) for pair, color in pairs.items() if contrast(color, theme[pair[1]]) < 4.5}
    assert not low

def test_the_card_has_the_size_that_sites_expect():
    head = (root/'nbs'/'images'/'card.png').read_bytes()[:24]
    assert head[1:4] == b'PNG' and (int.from_bytes(head[16:20], 'big'), int.from_bytes(head[20:24], 'big')) == (1200, 630)
    assert 'images/card.png' in (root/'_quarto.yml').read_text()
