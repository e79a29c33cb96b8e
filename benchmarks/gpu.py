"""The experiments that need a GPU, in pieces of about twelve minutes, a command each. Each keeps to its budget and
leaves what it did in one folder, however it ends.

    python benchmarks/gpu.py one --out piece --budget 660       # needs the twelve classes' images only
    python benchmarks/gpu.py two --out piece --budget 660       # needs CIFAR-100
    python benchmarks/gpu.py three --out piece --budget 660
    python benchmarks/gpu.py one --quick --out piece            # in miniature, on any machine, on made-up images

one: the tests that need CUDA; a profile of ResNet-18 at batch 500 on made-up images; how a batch of 60 is fed fastest;
the studies twelve, twelve-rivals and twelve-full. two: Table 2, cross-entropy first; if its accuracy is more than 2
points from the paper's, nothing else is trained until someone has found out why. three: the rest of Table 2, then the
other networks of Table 1.

Records and checkpoints go to --work, outside the tree. What is finished is packed into OUT/results.tgz, and
OUT/steps.json says of each step how it ended and how long it took. A step that fails does not stop the next one. On an
NVIDIA H200 a run of twelve or twelve-rivals took 3 s (14 at a time). An epoch of twelve-full took 1.05 s with 8 runs at a
time, so those 8 need about 210 s, 26 s each; give it no less.
"""

import argparse, json, os, subprocess, sys, tarfile, time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the package need not be installed
CUDA_TESTS = 'no_synchronisation_on_a_gpu or cuda_graph or a_gpu_gives_what_the_cpu_gives or mixed_precision_on_a_gpu or resumed_on_a_gpu'
FAST = ['precision=bfloat16', 'channels_last=true']


class Piece:
    "Runs steps one after the other, each with its own limit, and keeps an account"

    def __init__(self, out, work, budget, only=(), graphs=False):
        self.out, self.work, self.end, self.steps = Path(out), Path(work), time.monotonic() + budget, []
        self.only, self.graphs = only, graphs
        self.out.mkdir(parents=True, exist_ok=True)
        self.work.mkdir(parents=True, exist_ok=True)

    def left(self, at_most=float('inf'), spare=15):
        "Seconds that a step may take: what is left, less a little for packing"
        return max(0, min(at_most, self.end - time.monotonic() - spare))

    def step(self, name, command, limit, **env):
        "Run `command` for at most `limit` seconds; its output goes to OUT/<name>.log"
        if self.only and name not in self.only:
            return
        start, seconds = time.monotonic(), self.left(limit)
        if seconds < 5:
            status = 'no time was left'
        else:
            with open(self.out / f'{name}.log', 'w') as log:
                path = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get('PYTHONPATH')]))
                env = {**os.environ, 'PYTHONPATH': path, **env}
                process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env)
                try:
                    status = process.wait(seconds)
                except subprocess.TimeoutExpired:
                    process.terminate()
                    try:
                        process.wait(5)
                    except subprocess.TimeoutExpired:
                        process.kill()
                    status = 'stopped: its time was up'
        self.note(name, status, start)
        if (log := self.out / f'{name}.log').exists():
            print(''.join(log.read_text(errors='replace').splitlines(keepends=True)[-6:]), flush=True)

    def note(self, name, status, start=None):
        "Say how a step ended; `start` is the time when it began"
        seconds = 0 if start is None else round(time.monotonic() - start, 1)
        self.steps.append(dict(step=name, status=status, seconds=seconds))
        print(json.dumps(self.steps[-1]), flush=True)
        self.save()

    def study(self, name, limit, workers, *changes, step=None, **options):
        "Train what a study lacks, resuming what was begun"
        command = [
            sys.executable,
            '-m',
            'gini_loss.study',
            name,
            '--results',
            str(self.work / 'results'),
            '--checkpoints',
            str(self.work / 'checkpoints'),
            '--budget',
            str(max(1, self.left(limit, spare=25))),
            '--workers',
            str(workers),
        ]
        if self.graphs:
            command += ['--cuda-graphs']
        if changes:
            command += ['--set', *changes]
        for key, value in options.items():
            command += [f'--{key}', str(value)]
        self.step(step or name, command, limit)

    def save(self):
        "Every record, packed; trained networks stay in WORK/weights"
        (self.out / 'steps.json').write_text(json.dumps(self.steps, indent=1))
        with tarfile.open(self.out / 'results.tgz', 'w:gz') as archive:
            if (self.work / 'results').is_dir():
                archive.add(self.work / 'results', 'results')


def probe(rounds=60):
    "Milliseconds of a forward and backward pass of the paper's ResNet-18 at batch 60: launched one by one, and as a CUDA graph"
    import torch
    from gini_loss.models import resnet18

    torch.manual_seed(0)
    x, y = (
        torch.rand(60, 3, 32, 32, device='cuda').to(memory_format=torch.channels_last),
        torch.arange(60, device='cuda') % 12,
    )
    found = {}
    for how in ('one by one', 'CUDA graph'):
        model = resnet18(12).cuda().to(memory_format=torch.channels_last)
        model.forward = torch.autocast('cuda', dtype=torch.bfloat16, cache_enabled=False)(model.forward)
        f = torch.cuda.make_graphed_callables(model, (x,)) if how == 'CUDA graph' else model
        for i in range(10 + rounds):
            if i == 10:
                torch.cuda.synchronize()
                start = time.perf_counter()
            torch.nn.functional.cross_entropy(f(x).float(), y).backward()
            model.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        found[how] = 1e3 * (time.perf_counter() - start) / rounds
    print(json.dumps({f'{k}, ms a step': round(v, 3) for k, v in found.items()}))


def fitting_workers(piece, args, seconds=27):
    "As many runs of twelve-full at a time as end in the time that is left: side by side each adds `seconds`"
    return max(1, min(args.full_workers, int((piece.left() - 30) // seconds)))


def one(piece, args):
    python = sys.executable
    piece.step(
        'tests',
        [
            python,
            '-m',
            'pytest',
            '-q',
            '-p',
            'no:cacheprovider',
            '-k',
            CUDA_TESTS,
            'tests/test_cost.py',
            'tests/test_robustness.py',
            'tests/test_train.py',
        ],
        75,
        CUBLAS_WORKSPACE_CONFIG=':4096:8',
    )
    epoch = [
        python,
        'benchmarks/epoch.py',
        '--data',
        'made-up',
        '--rounds',
        '2',
        '--budget',
        '50',
        '--out',
        str(piece.out / 'epoch.json'),
        '--variants',
        'float32',
        'without the terms',
        'CUDA graphs',
        'CUDA graphs, no terms',
    ]
    if args.quick:
        epoch += ['--images', '400', '--bs', '100', '--width', '4']
    piece.step('profile', epoch, 110)
    if not args.quick:
        piece.step('probe', [python, __file__, 'probe'], 30)
    if args.quick:
        return piece.study('test', 120, 2)
    piece.study('twelve', args.limits[0], args.workers, weights=piece.work / 'weights')
    piece.study('twelve-rivals', args.limits[1], args.workers)
    piece.study('twelve-full', args.limits[2], fitting_workers(piece, args), *FAST)


def full(piece, args):
    piece.study('twelve-full', float('inf'), fitting_workers(piece, args), *FAST)


def baseline_is_sound(piece, study, paper, points):
    """Whether cross-entropy with seed 0 has a record, and an accuracy within `points` of the paper's, at the epoch with
    the best validation accuracy, as in the paper"""
    from gini_loss.records import load_results

    (piece.work / 'results').mkdir(exist_ok=True)
    runs = load_results(piece.work / 'results')
    found = runs[(runs.study == study) & (runs.loss == 'ce') & (runs.seed == 0)]
    if not len(found):
        piece.note('baseline', 'no record yet: run the same command again')
        return False
    accuracy = 100 * found.best_test_accuracy.iloc[0]
    sound = abs(accuracy - paper) <= points
    numbers = f'{accuracy:.2f} %, in the paper {paper:.2f} %'
    piece.note('baseline', numbers if sound else f'{numbers}: find out why before any other run')
    return sound


def table2(piece, args):
    "Cross-entropy with seed 0 and, if that is sound, the other runs of Table 2; whether it is sound"
    from gini_loss.paper import paper_table

    study, changes, points = ('test', [], 100) if args.quick else ('table2', FAST, 2)
    paper = paper_table(2).set_index('loss').loc['ce', 'mean']
    piece.study(study, float('inf'), 1, *changes, 'loss=ce', 'seed=0', step='baseline-run')
    sound = baseline_is_sound(piece, study, paper, points)
    if sound:
        piece.study(study, float('inf'), 1, *changes)
    return sound


def two(piece, args):
    table2(piece, args)


def three(piece, args):
    if table2(piece, args) and not args.quick:
        piece.study('table1', float('inf'), 1, *FAST)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        'piece', choices=('one', 'full', 'two', 'three', 'probe'), help='full: only the study twelve-full of piece one'
    )
    parser.add_argument('--out', default='piece', help='folder for everything that the piece leaves')
    parser.add_argument('--work', default=None, help='folder of records and checkpoints (OUT/work)')
    parser.add_argument('--budget', type=float, default=660, metavar='SECONDS')
    parser.add_argument('--workers', type=int, default=12, help='runs at a time of the small studies')
    parser.add_argument('--full-workers', type=int, default=8, help='runs of twelve-full at a time, at most')
    parser.add_argument(
        '--limits',
        type=float,
        nargs=3,
        default=[200, 150, 600],
        metavar='SECONDS',
        help='of twelve, twelve-rivals, twelve-full',
    )
    parser.add_argument('--only', nargs='+', default=(), metavar='STEP', help='of the piece, only these steps')
    parser.add_argument('--quick', action='store_true', help='in miniature, on any machine')
    args = parser.parse_args()
    if args.piece == 'probe':
        return probe()
    os.chdir(HERE.parent)
    piece = Piece(args.out, args.work or Path(args.out) / 'work', args.budget, args.only, graphs=not args.quick)
    try:
        dict(one=one, full=full, two=two, three=three)[args.piece](piece, args)
    finally:
        piece.save()


if __name__ == '__main__':
    main()
