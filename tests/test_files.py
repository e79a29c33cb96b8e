"""Fuzz of the files that the package reads: records, checkpoints and studies of any bytes give what they hold, or an error of the documented type.

`GINI_LOSS_FUZZ=10000 pytest tests/test_files.py` draws that many fresh examples; without it each fuzz draws 150, the same each time.
"""
import copy, hashlib, io, json, os, struct, warnings
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

for name in ('fastai', 'pandas'): pytest.importorskip(name, reason="records are read with pandas and the engine")
warnings.filterwarnings('ignore', category=FutureWarning)
from gini_loss.results import RecordError, SCHEMA, check_record, load_results, read_predictions, read_record
from gini_loss.study import Study, load_study, study_state
from gini_loss.train import CheckpointError, Config, _MAGIC, load_checkpoint, read_checkpoint_header, recipe, save_checkpoint, train

FUZZ = int(os.environ.get('GINI_LOSS_FUZZ', 0))
profile = settings(max_examples=FUZZ or 150, derandomize=not FUZZ, deadline=None, database=None, suppress_health_check=list(HealthCheck))

def a_record():
    "A good record, made up"
    c = recipe('test', epochs=2)
    scores = dict(epoch=1, valid_accuracy=.5, test_accuracy=.5, test_loss=1., caltech_accuracy=None, caltech_accuracy_12=None, caltech_loss=None)
    return dict(format=1, run_id=c.run_id, config_hash=c.config_hash, pair_hash=c.pair_hash, config=json.loads(json.dumps(asdict(c))), last=scores, best=dict(scores),
                layer=dict(name='layer4', channels=32, dead_channels=0, gini=.5, kl=.1), seconds=dict(training=1., session=1., sessions=1),
                hardware=dict(device='cpu', device_name='cpu', cores=2, threads=1, processes=1), versions=dict(python='3', torch='2', fastai='2', gini_loss='0'),
                finished='2026-01-01', source=dict(commit=None), epochs={k: [.5, .5] for k in SCHEMA['epochs']})

GOOD = a_record()
json_values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from([10**30, -1, 0, 'nan', '../..']),
                           lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3), max_leaves=6)

def places(value, path=()):
    "All places in nested dicts and lists"
    yield path
    for k, v in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else (): yield from places(v, (*path, k))

def with_changes(record, changes):
    record = copy.deepcopy(record)
    for path, how, new in changes:
        at = record
        try:
            for k in path[:-1]: at = at[k]
            if not path: record = new
            elif how == 'delete': del at[path[-1]]
            elif how == 'add' and isinstance(at, dict): at[str(new)[:8]] = new
            else: at[path[-1]] = new
        except (KeyError, IndexError, TypeError): pass
    return record

PLACES = list(places(GOOD))
changes = st.lists(st.tuples(st.sampled_from(PLACES), st.sampled_from(['replace', 'delete', 'add']), json_values), min_size=1, max_size=3)

def mutated(data):
    "Bytes with a few of them changed, cut, doubled or put in"
    return st.lists(st.tuples(st.integers(0, max(len(data) - 1, 0)), st.sampled_from(['flip', 'cut', 'insert', 'double']), st.binary(max_size=4)), max_size=4).map(lambda edits: _edit(data, edits))

def _edit(data, edits):
    for place, how, new in edits:
        place = min(place, len(data))
        data = {'flip': data[:place] + new + data[place + len(new):], 'cut': data[:place], 'insert': data[:place] + new + data[place:], 'double': data[:place] + data[place:]*2}[how]
    return data

def unchanged(folder, before): assert {p: p.read_bytes() for p in Path(folder).rglob('*') if p.is_file()} == before
def files(folder): return {p: p.read_bytes() for p in Path(folder).rglob('*') if p.is_file()}

@pytest.fixture(scope='module')
def folder(tmp_path_factory): return tmp_path_factory.mktemp('files')

# ---- Records ----

def read_all(folder, file):
    before = files(folder)
    try: runs = load_results(folder)
    except RecordError as e: assert file.name in str(e); good = False
    else: assert len(runs) == 1; good = True
    try: record = read_record(str(file)); assert isinstance(record, dict) and good
    except RecordError as e: assert file.name in str(e) and not good
    c = recipe('test', epochs=2)                                                         # a study looks at the same files for the time of a run
    state, = study_state(Study('a', 'a', [c]), folder, folder/'checkpoints')
    assert state.state in ('missing', 'done')
    unchanged(folder, before)
    return good

def test_the_good_record_is_good(folder):
    where = folder/'good'; where.mkdir()
    (where/'r.json').write_text(json.dumps(GOOD))
    assert read_all(where, where/'r.json') and check_record(GOOD).run_id == GOOD['run_id']

@given(data=mutated(json.dumps(GOOD).encode()) | st.binary(max_size=60))
@profile
def test_fuzz_record_bytes(folder, data):
    where = folder/'bytes'; where.mkdir(exist_ok=True)
    (where/'r.json').write_bytes(data)
    read_all(where, where/'r.json')

@given(edits=changes)
@profile
def test_fuzz_record_values(folder, edits):
    where = folder/'values'; where.mkdir(exist_ok=True)
    (where/'r.json').write_text(json.dumps(with_changes(GOOD, edits)))
    read_all(where, where/'r.json')

@pytest.mark.parametrize('text', ['', '[', '[]', '{}', 'null', '"a"', '1e999', '['*100_000, '{"a":'*100_000, '1'*10_000, '\ufeff{}', '\x00'])
def test_odd_json_is_a_bad_record(tmp_path, text):
    (tmp_path/'r.json').write_text(text)
    assert not read_all(tmp_path, tmp_path/'r.json')

@given(data=st.binary(max_size=60) | st.binary(max_size=40).map(lambda b: b'PK\x03\x04' + b))
@profile
def test_fuzz_predictions(folder, data):
    where = folder/'npz'; where.mkdir(exist_ok=True)
    (where/'r.json').write_text(json.dumps(GOOD)); (where/'r.npz').write_bytes(data); before = files(where)
    try: assert isinstance(read_predictions(str(where/'r.json')), dict)
    except RecordError as e: assert 'r.npz' in str(e)
    unchanged(where, before)

# ---- Checkpoints ----

CONFIG = recipe('test', epochs=2)
HEADER = dict(run_id=CONFIG.run_id, config=json.loads(json.dumps(asdict(CONFIG))), epoch=0, seconds=1.5, sessions=1)

def packed(header, payload, magic=_MAGIC):
    "A checkpoint with these bytes for its header and state, and a right checksum"
    digest = hashlib.blake2b(header + bytes(1), digest_size=32); digest.update(payload)
    return magic + struct.pack('<Q', len(header)) + header + digest.digest() + payload

@pytest.fixture(scope='module')
def good_checkpoint(folder):
    save_checkpoint(folder/'good.pt', HEADER, dict(a=torch.arange(4.), b=[1, 'x']))
    return (folder/'good.pt').read_bytes()

def read_checkpoint(path, data):
    path.parent.mkdir(exist_ok=True); path.write_bytes(data)
    for read in (lambda: read_checkpoint_header(path), lambda: load_checkpoint(path)[0], lambda: load_checkpoint(path, CONFIG)[0]):
        try: assert isinstance(read(), dict)
        except CheckpointError as e: assert path.name in str(e)
    assert path.read_bytes() == data and len(list(path.parent.iterdir())) == 1
    state, = study_state(Study('a', 'a', [CONFIG]), path.parent, path.parent)
    assert state.state in ('stopped', 'missing') and state.epochs >= 0

@given(data=st.data())
@profile
def test_fuzz_checkpoint_bytes(folder, good_checkpoint, data):
    kind = data.draw(st.sampled_from(['mutated', 'any', 'after the magic']))
    raw = data.draw(mutated(good_checkpoint) if kind == 'mutated' else st.binary(max_size=80))
    read_checkpoint(folder/'checkpoint'/f'{CONFIG.run_id}.pt', _MAGIC + raw if kind == 'after the magic' else raw)

@given(header=json_values | changes.map(lambda c: with_changes(HEADER, [(p[-1:], h, v) for p, h, v in c])) | st.fixed_dictionaries(
           {}, optional=dict(epoch=json_values, seconds=json_values, config=json_values, sessions=json_values)), payload=st.binary(max_size=40), whole=st.booleans())
@profile
def test_fuzz_checkpoint_headers(folder, header, payload, whole):
    "With a right checksum, so that what is inside is looked at"
    if whole: buffer = io.BytesIO(); torch.save(dict(a=torch.ones(2)), buffer); payload = buffer.getvalue()
    read_checkpoint(folder/'header'/f'{CONFIG.run_id}.pt', packed(json.dumps(header).encode(), payload))

@pytest.mark.parametrize('header', [b'', b'[', b'[]', b'null', b'['*100_000, b'\xff\xfe', b'1'*10_000])
def test_odd_headers(tmp_path, header): read_checkpoint(tmp_path/'c'/f'{CONFIG.run_id}.pt', packed(header, b''))

def test_code_in_a_checkpoint_is_not_run(tmp_path):
    "Only tensors, numbers and strings are unpickled"
    class Evil:
        def __reduce__(self): return os.mkdir, (str(tmp_path/'pwned'),)
    buffer = io.BytesIO(); torch.save(dict(a=Evil()), buffer)
    (tmp_path/'c.pt').write_bytes(packed(json.dumps(HEADER).encode(), buffer.getvalue()))
    with pytest.raises(CheckpointError, match='c.pt'): load_checkpoint(tmp_path/'c.pt')
    assert not (tmp_path/'pwned').exists()

@pytest.mark.parametrize('data', [b'', b'x', _MAGIC, _MAGIC + b'\xff'*8, packed(b'[]', b''), packed(json.dumps(HEADER).encode(), b'junk')], ids=['empty', 'x', 'magic', 'length', 'list', 'junk'])
def test_training_does_not_overwrite_a_checkpoint_that_it_cannot_read(tmp_path, data):
    path = tmp_path/'checkpoints'/f'{CONFIG.run_id}.pt'; path.parent.mkdir(); path.write_bytes(data)
    with pytest.raises(CheckpointError, match=path.name): train(CONFIG, tmp_path/'results', tmp_path/'checkpoints', verbose=False, device='cpu')
    assert path.read_bytes() == data

# ---- Studies ----

STUDY = b"[study]\ntitle = a test # of studies\n[runs]\npreset = test\nloss = ce both\nseed = 0-2\nlr = 0.01 0.02\nmilestones = 1 2\nwidth = none 4\n[more]\npreset = laptop\nepochs = 3\n"
words = st.sampled_from('preset loss seed lr width milestones arch title none test laptop both ce 0-2 3-1 0.1 nan inf true % [ ] = : # ; \n \t é ² \x00'.split(' ') + ['[runs]\n', '[study]\n', '[DEFAULT]\n', '\n', ' = '])

def read_study(path, data):
    path.parent.mkdir(exist_ok=True); path.write_bytes(data)
    try: study = load_study(path)
    except ValueError: pass
    else: assert study.configs and all(isinstance(c, Config) for c in study.configs)
    assert path.read_bytes() == data and len(list(path.parent.iterdir())) == 1

def test_the_good_study_is_good(tmp_path):
    (tmp_path/'s.ini').write_bytes(STUDY)
    assert len(load_study(tmp_path/'s.ini').configs) == 2*3*2*2 + 1

@given(data=mutated(STUDY) | st.binary(max_size=60) | st.lists(words, max_size=14).map(lambda w: ' '.join(w).encode()) | st.lists(words, max_size=14).map(lambda w: ('[runs]\n' + ' '.join(w)).encode()))
@profile
def test_fuzz_study(folder, data): read_study(folder/'study'/'s.ini', data)

@pytest.mark.parametrize('line', ['seed = 0-999999999999', 'seed = 0-9999\nepochs = 1-9999', 'seed = ' + '1'*5000, 'milestones = ' + '9'*5000])
def test_studies_too_large_to_be_meant(tmp_path, line):
    "An error, not hours and all of the memory"
    (tmp_path/'s.ini').write_text(f'[runs]\npreset = test\n{line}\n')
    with pytest.raises(ValueError): load_study(tmp_path/'s.ini')
