"The pieces of benchmarks/gpu.py without a GPU: their account, their order, and the verdict on the baseline."

import argparse, importlib.util, json, sys, tarfile
from pathlib import Path

import pytest

from gini_loss.config import parse_changes, recipe
from gini_loss.study import load_study

from made_up import put

SCRIPT = Path(__file__).parents[1] / 'benchmarks' / 'gpu.py'
ARGS = argparse.Namespace(quick=False, workers=12, full_workers=8, limits=[200, 150, 600])
FAST = dict(precision='bfloat16', channels_last=True)


@pytest.fixture(scope='module')
def gpu():
    if not SCRIPT.exists():
        pytest.skip('the benchmarks are not here')
    spec = importlib.util.spec_from_file_location('gpu', SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def piece(gpu, tmp_path):
    return gpu.Piece(tmp_path / 'out', tmp_path / 'work', budget=600, graphs=True)


@pytest.fixture
def commands(piece, monkeypatch):
    "The commands of the piece in their order; none of them is run"
    found = {}
    monkeypatch.setattr(piece, 'step', lambda name, command, limit, **env: found.update({name: command}))
    return found


def trained(command):
    "The runs that a command of `gini_loss.study` trains, in order"
    words = command[command.index('gini_loss.study') + 1 :]
    changes = [w for w in words[words.index('--set') + 1 :] if '=' in w] if '--set' in words else []
    return [(c.arch, c.loss, c.seed) for c in load_study(words[0], **parse_changes(changes)).configs]


def test_each_step_has_its_account(piece):
    "A step that fails or takes too long does not stop the next one, and what there is gets packed"
    (piece.work / 'results').mkdir()
    (piece.work / 'results' / 'a.json').write_text('{}')
    piece.step('fails', [sys.executable, '-c', 'print("why"); raise SystemExit(4)'], 60)
    piece.step('hangs', [sys.executable, '-c', 'import time; time.sleep(600)'], 5)
    piece.step('works', [sys.executable, '-c', ''], 60)
    piece.end -= 600
    piece.step('late', [sys.executable, '-c', ''], 60)
    steps = {o['step']: o['status'] for o in json.loads((piece.out / 'steps.json').read_text())}
    assert steps == dict(fails=4, hangs='stopped: its time was up', works=0, late='no time was left')
    assert 'why' in (piece.out / 'fails.log').read_text()
    with tarfile.open(piece.out / 'results.tgz') as archive:
        assert 'results/a.json' in archive.getnames()


def test_only_the_chosen_steps(gpu, tmp_path):
    piece = gpu.Piece(tmp_path / 'out', tmp_path / 'work', 600, only=('chosen',))
    for name in ('chosen', 'other'):
        piece.step(name, [sys.executable, '-c', ''], 60)
    assert [o['step'] for o in piece.steps] == ['chosen']


def test_the_first_piece(gpu, piece, commands):
    "Tests and measurements come first, then the studies of the twelve classes"
    gpu.one(piece, ARGS)
    assert list(commands) == ['tests', 'profile', 'probe', 'twelve', 'twelve-rivals', 'twelve-full']
    assert all(Path(word).exists() for word in commands['tests'] if word.startswith('tests/'))
    full = commands['twelve-full']
    assert '--cuda-graphs' in full and full[full.index('--workers') + 1] == '8'
    assert [run[1:] for run in trained(full)[:3]] == [('ce', 0), ('both', 0), ('both', 0)]


@pytest.mark.parametrize('budget, workers', [(660, 8), (150, 3), (20, 1)])
def test_no_more_runs_at_a_time_than_end_in_time(gpu, tmp_path, budget, workers):
    assert gpu.fitting_workers(gpu.Piece(tmp_path / 'out', tmp_path / 'work', budget), ARGS) == workers


@pytest.mark.parametrize(
    'accuracy, status, steps',
    [
        (0.70, '70.00 %, in the paper 71.47 %', ['baseline-run', 'table2', 'table1']),
        (0.69, '69.00 %, in the paper 71.47 %: find out why before any other run', ['baseline-run']),
        (None, 'no record yet: run the same command again', ['baseline-run']),
    ],
)
def test_the_baseline_comes_first(gpu, piece, commands, accuracy, status, steps):
    "The other runs start only if cross-entropy is within 2 points of the paper"
    if accuracy is not None:
        put(piece.work / 'results' / 'table2', recipe('resnet18', loss='ce', **FAST), test=0.1, best=accuracy)
    gpu.three(piece, ARGS)
    assert list(commands) == steps and [(o['step'], o['status']) for o in piece.steps] == [('baseline', status)]
    assert trained(commands['baseline-run']) == [('resnet18', 'ce', 0)]
    if 'table2' in commands:
        runs = [run[1:] for run in trained(commands['table2'])]
        assert runs[:4] == [('ce', 0), ('both', 0), ('ce', 1), ('both', 1)] and len(runs) == 20
        networks = list(dict.fromkeys(run[0] for run in trained(commands['table1'])))
        assert networks == ['resnet17', 'resnet18', 'cvt7', 'resnet50']
