"""Images per second of the device-resident loader against fastai's stock `ImageDataLoaders`, augmentation included.

    python benchmarks/loader.py                       # 10,000 images of CIFAR-100, 5 rounds; writes benchmarks/results/loader-<device>.json
    python benchmarks/loader.py --rounds 9 --device cuda

Each loader gives normalised float batches (bs, 3, 32, 32), cropped at random with padding 4 and flipped at random, of the
same training images. A round runs every loader in turn, for at least one epoch and one second, so that a change in the machine's load meets all of
them. Shown: the median over rounds with the smallest and the largest, of the rate and of the ratio within each round.
The stock loader reads its files from a warm page cache and runs with workers and without; the faster one is the reference.
"""
import argparse, datetime, json, os, statistics, time, warnings
from pathlib import Path

warnings.filterwarnings('ignore')
import fastai, torch
from fastai.data.external import URLs, untar_data
from fastai.data.transforms import Normalize
from fastai.vision.augment import CropPad, FlipItem, RandomCrop
from fastai.vision.data import ImageDataLoaders

from gini_loss.data import CIFAR100_MEAN, CIFAR100_STD, DeviceLoader, load_cifar100
from gini_loss.train import environment


def rate(loader, device, at_least=1.):
    "Images per second over as many whole epochs as fill `at_least` seconds, the start of workers included."
    start, n, seconds = time.perf_counter(), 0, 0
    while seconds < at_least:
        for x, y in loader: n += len(x)
        if device.type == 'cuda': torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    return n/seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--images', type=int, default=10_000, help='training images per epoch (default 10,000)')
    parser.add_argument('--bs', type=int, default=500, help='batch size (default 500)')
    parser.add_argument('--rounds', type=int, default=5, help='turns of each loader (default 5)')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--threads', type=int, help="torch's threads (default: torch's own choice; 1 is better on a machine busy with other work)")
    parser.add_argument('--out', help='file for the record (default: benchmarks/results/loader-<device>.json; none: no file)')
    args = parser.parse_args()
    if args.threads: torch.set_num_threads(args.threads)
    device = torch.device(args.device)

    data = load_cifar100()
    root = untar_data(URLs.CIFAR_100)
    folders = sorted(root.glob('train/*/*'), key=lambda o: o.name)
    files = [f for o in folders for f in sorted(o.glob('*.png'), key=lambda f: f.name)]
    index = torch.linspace(0, len(files) - 1, args.images).long()
    files = [files[i] for i in index]
    ours = DeviceLoader((data.train.images[index], data.train.labels[index]), bs=args.bs, shuffle=True, augment=True, device=device)

    def stock(num_workers):
        return ImageDataLoaders.from_lists(root, files, [f.parent.name for f in files], valid_pct=0, bs=args.bs, num_workers=num_workers, device=device,
            item_tfms=[CropPad(40), RandomCrop(32), FlipItem(.5)], batch_tfms=Normalize.from_stats(CIFAR100_MEAN, CIFAR100_STD)).train

    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    loaders = {'DeviceLoader': ours, 'stock, no workers': stock(0), f'stock, {cores} workers': stock(cores)}
    for name, loader in loaders.items():  # the same work: shape, type, range
        x = loader.one_batch()[0]
        assert x.shape == (args.bs, 3, 32, 32) and x.dtype == torch.float32 and x.device.type == device.type, name
        assert abs(x.float().mean().item() + .25) < .25 and x.min() > -2 and x.max() < 2.2, name  # black borders pull the mean below 0

    load_before = os.getloadavg()[0] if hasattr(os, 'getloadavg') else None
    rates = {name: [] for name in loaders}
    for _ in range(args.rounds + 1):
        for name, loader in loaders.items():
            rates[name].append(rate(loader, device))
    for o in rates.values(): o.pop(0)  # the first round warms caches

    found, summary = environment(device), lambda o: dict(median=statistics.median(o), low=min(o), high=max(o))
    load = f", load average {load_before:.1f}" if load_before is not None else ''
    print(f"{found['hardware']['device_name']}, {cores} cores{load}, torch {torch.__version__} with {torch.get_num_threads()} threads, fastai {fastai.__version__}")
    print(f"{args.images:,} images, batches of {args.bs}, {args.rounds} rounds: median (smallest to largest)\n")
    print(f"{'loader':<20}{'images per second':>28}{'DeviceLoader is faster by':>32}")
    for name, o in rates.items():
        ratios = [a/b for a, b in zip(rates['DeviceLoader'], o)]
        middle = f"{statistics.median(o):,.0f} ({min(o):,.0f} to {max(o):,.0f})"
        ratio = '' if name == 'DeviceLoader' else f"{statistics.median(ratios):.1f}× ({min(ratios):.1f} to {max(ratios):.1f})"
        print(f"{name:<20}{middle:>28}{ratio:>32}")
    fastest = [max(o) for o in zip(*(v for k, v in rates.items() if k != 'DeviceLoader'))]
    ratios = [a/b for a, b in zip(rates['DeviceLoader'], fastest)]
    print(f"\nAgainst the faster stock loader of each round: {statistics.median(ratios):.1f}× ({min(ratios):.1f} to {max(ratios):.1f}); goal on 2 cores: at least 10×")
    if args.out != 'none':
        out = Path(args.out or Path(__file__).parent / 'results' / f'loader-{device.type}.json')
        out.parent.mkdir(parents=True, exist_ok=True)
        record = dict(benchmark='loader', date=datetime.date.today().isoformat(), **found, cores=cores, load_before=load_before, images=args.images, bs=args.bs, rounds=args.rounds,
                      images_per_second={k: summary(v) for k, v in rates.items()}, ratio_to_faster_stock=summary(ratios))
        out.write_text(json.dumps(json.loads(json.dumps(record), parse_float=lambda v: float(f'{float(v):.6g}')), indent=1) + '\n', encoding='utf-8')
        print(f"written: {os.path.relpath(out)}")


if __name__ == '__main__': main()
