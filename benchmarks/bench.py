#!/usr/bin/env python3
"""Compare annbatch_dask with annbatch on the synthetic atlas, in turn on this machine, and print a table.

`make bench` runs this. Each measurement is a process of its own; A B A B, so that a change in the machine's
mood hits both. Peak memory is the largest resident set (VmHWM) that any one process of the run reached.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path

import psutil

import annbatch_dask

HERE = Path(__file__).parent
SAMPLE_S = 0.02
SCALING_DATASET_SIZE = 20_000
OURS, PACKED, THEIRS = "annbatch_dask", "annbatch_dask, packed", "annbatch"
OUTPUTS = {"csr": "CSR batches", "dense": "dense float32 batches", "genes": "dense batches of 2,000 chosen genes"}


@dataclass(frozen=True)
class Setup:
    """Where things are, and how often to measure."""

    shared: Path
    work: Path
    annbatch_python: str | None
    repeats: int
    epochs: int
    dataset_size: int


@dataclass
class PeakSampler:
    """Watches a process and its descendants until closed; `peak` is in bytes."""

    pid: int
    peak: int = 0
    _done: threading.Event = field(default_factory=threading.Event)

    def watch(self) -> None:
        """Sample until closed or the process is gone."""
        root = psutil.Process(self.pid)
        while not self._done.wait(SAMPLE_S):
            try:
                tree = [root, *root.children(recursive=True)]
            except psutil.Error:
                return
            self.peak = max([self.peak, *map(high_water, tree)])

    def close(self) -> None:
        """Stop."""
        self._done.set()


def high_water(process: psutil.Process) -> int:
    """Return the largest resident set a process has had, in bytes; 0 once it is gone."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")), 0)


def run(command: list[str]) -> tuple[list[dict[str, float]], int]:
    """Run one measurement; return its JSON lines and the peak of any one process in bytes."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    sampler = PeakSampler(process.pid)
    thread = threading.Thread(target=sampler.watch)
    thread.start()
    out, err = process.communicate()
    sampler.close()
    thread.join()
    if process.returncode:
        sys.exit(f"{err}\nbench: exit code {process.returncode} from: {' '.join(command)}")
    return [json.loads(line) for line in out.splitlines() if line.startswith("{")], sampler.peak


def ours(*args: str | Path) -> list[str]:
    """Return the command of one of our jobs."""
    return [sys.executable, str(HERE / "jobs.py"), *map(str, args)]


def theirs(setup: Setup, *args: str | Path) -> list[str]:
    """Return the command of one of annbatch's jobs."""
    return [str(setup.annbatch_python), str(setup.shared / "bench/peer_annbatch.py"), *map(str, args)]


def annbatch_job(setup: Setup, *args: str | Path) -> list[str]:
    """Return the command of one of our jobs, run by annbatch's Python."""
    return [str(setup.annbatch_python), *ours(*args)[1:]]


def atlas(setup: Setup, scale: float, given: str) -> Path:
    """Return the folder of the files at this scale; make them where none are given."""
    if given:
        return Path(given)
    folder = setup.work / f"atlas_{scale}"
    if not list(folder.glob("*.h5ad")):
        generator = setup.shared / "bench/make_atlas.py"
        if not generator.exists():
            sys.exit(f"bench: no atlas: {generator} is missing; give ATLAS=folder or SHARED=folder")
        subprocess.run([sys.executable, str(generator), str(folder), "--scale", str(scale)], check=True)
    return folder


def find_annbatch(given: str) -> str | None:
    """Return a Python that can import annbatch, or None."""
    python = given or sys.executable
    probe = subprocess.run([python, "-c", "import annbatch, zarrs"], capture_output=True, check=False)
    return python if probe.returncode == 0 else None


def fresh(path: Path) -> Path:
    """Return the path with nothing there."""
    shutil.rmtree(path, ignore_errors=True)
    return path


def stores(setup: Setup) -> dict[str, Path]:
    """Return where each side's collection goes."""
    names = [OURS, PACKED, THEIRS] if setup.annbatch_python else [OURS, PACKED]
    return {name: setup.work / f"{name.replace(', ', '-')}.zarr" for name in names}


def bench_shuffle(setup: Setup, folder: Path) -> dict[str, dict[str, list[float]]]:
    """Shuffle in turn; return seconds and peaks of each side."""
    found: dict[str, dict[str, list[float]]] = {}
    for _ in range(setup.repeats):
        for name, path in stores(setup).items():
            args = ("shuffle", folder, fresh(path), "--dataset-size", str(setup.dataset_size))
            layout = ("--layout", "packed") if name == PACKED else ()
            lines, peak = run(theirs(setup, *args) if name == THEIRS else ours(*args, *layout))
            add(found, name, "shuffle, s", lines[0]["seconds"])
            add(found, name, "peak RSS of any process, GB", peak / 1e9)
    return found


def bench_load(setup: Setup) -> dict[str, dict[str, list[float]]]:
    """Stream in turn, each side its own collection; return cells per second, the first epoch of each left out."""
    found: dict[str, dict[str, list[float]]] = {}
    for output, label in OUTPUTS.items():
        for _ in range(setup.repeats):
            for name, path in stores(setup).items():
                package = THEIRS if name == THEIRS else OURS
                args = ("load", path, "--output", output, "--epochs", str(1 + setup.epochs), "--package", package)
                lines, _ = run(annbatch_job(setup, *args) if name == THEIRS else ours(*args))
                for line in lines[1:]:
                    add(found, name, f"{label}, cells/s", line["cells_per_s"])
    return found


def bench_consumer(setup: Setup) -> None:
    """Print how much longer an epoch takes with a consumer as slow as the loader: 1 is perfect, 2 no overlap."""
    store = stores(setup)[OURS]
    print("\n| consumer as slow as the loader | loader alone, s | with it, s | longer than the larger of both |")
    print("|---|---|---|---|")
    for output, label in OUTPUTS.items():
        args = ("load", store, "--output", output, "--epochs", str(setup.epochs))
        alone = statistics.median(line["seconds"] for line in run(ours(*args))[0])
        both = statistics.median(line["seconds"] for line in run(ours(*args, "--busy-s", str(alone)))[0])
        print(f"| {label} | {alone:.2f} | {both:.2f} | {both / alone:.2f} |")


def add(found: dict[str, dict[str, list[float]]], name: str, what: str, value: float) -> None:
    """Keep one measurement."""
    found.setdefault(name, {}).setdefault(what, []).append(value)


def print_table(found: dict[str, dict[str, list[float]]]) -> None:
    """Print medians, ranges and ratios (theirs / ours for seconds and bytes, ours / theirs for rates)."""
    print(f"\n| median (min-max) | {OURS} | {PACKED} | {THEIRS} | times better | packed |\n|---|---|---|---|---|---|")
    for what, values in found[OURS].items():
        packed, other = found[PACKED][what], found.get(THEIRS, {}).get(what)
        cells = [what, spread(values), spread(packed), spread(other) if other else "-"]
        print(f"| {' | '.join([*cells, ratio(what, values, other), ratio(what, packed, other)])} |")


def print_machine(setup: Setup) -> None:
    """Print what the figures hold for."""
    memory = psutil.virtual_memory().total / 1e9
    cores = len(psutil.Process().cpu_affinity() or [])
    versions = f"Python {platform.python_version()}, {OURS} {annbatch_dask.__version__}"
    print(f"{cores} cores, {memory:.0f} GB of memory, {versions}")
    if setup.annbatch_python is None:
        print(f"{THEIRS} is not importable (give ANNBATCH_PYTHON): measuring {OURS} alone")


def spread(values: list[float]) -> str:
    """Show median, minimum and maximum."""
    return f"{number(statistics.median(values))} ({number(min(values))}-{number(max(values))})"


def number(value: float) -> str:
    """Show three digits or thousands."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def ratio(what: str, mine: list[float], other: list[float] | None) -> str:
    """Show how many times better we are."""
    if not other:
        return "-"
    quotient = statistics.median(mine) / statistics.median(other)
    return f"{quotient if what.endswith('cells/s') else 1 / quotient:.2f}"


def print_scaling(setup: Setup, folders: dict[float, Path]) -> None:
    """Print our peak at each scale, in turn, with datasets small enough that both stages run side by side at each."""
    found: dict[float, dict[str, list[float]]] = {}
    for _ in range(setup.repeats):
        for scale, folder in folders.items():
            out = fresh(setup.work / "scaling.zarr")
            lines, peak = run(ours("shuffle", folder, out, "--dataset-size", str(SCALING_DATASET_SIZE)))
            found.setdefault(scale, {"s": [], "GB": []})["s"].append(lines[0]["seconds"])
            found[scale]["GB"].append(peak / 1e9)
            fresh(out)
    print(f"\n| scale, datasets of {SCALING_DATASET_SIZE:,} | seconds | peak RSS of any process, GB |\n|---|---|---|")
    for scale, values in found.items():
        print(f"| {scale} | {spread(values['s'])} | {spread(values['GB'])} |")


def print_ranks(setup: Setup) -> None:
    """Print epochs by one process of as many threads as cores, by one of far more, and by many of few."""
    print("\n| processes x threads, packed CSR | cells/s | CPU us a cell | threads | evictions a second |")
    print("|---|---|---|---|---|")
    for n_ranks, n_threads in ((1, psutil.cpu_count() or 1), (1, 16), (8, 2)):
        command = ours("ranks", stores(setup)[PACKED], "--ranks", str(n_ranks), "--threads", str(n_threads))
        runs = [run(command)[0][0] for _ in range(setup.repeats)]
        facts = ("cells_per_s", "cpu_us_per_cell", "threads", "evictions_per_s")
        print(f"| {n_ranks} x {n_threads} | {' | '.join(spread([line[fact] for line in runs]) for fact in facts)} |")


def print_python(setup: Setup) -> None:
    """Print what is left of a window of 16,384 cells where nothing is read, decoded and copied."""
    print("\n| threads | Python of a window, ms CPU | holds its lock, at most |\n|---|---|---|")
    for n_threads in (psutil.cpu_count() or 1, 16):
        lines, _ = run(ours("python", stores(setup)[OURS], "--threads", str(n_threads)))
        times = ([line[of] for line in lines if of in line] for of in ("cpu_ms_per_window", "lock_ms_per_window"))
        print(f"| {n_threads} | {' | '.join(map(spread, times))} |")


def print_tokens(setup: Setup) -> None:
    """Print how many tokens of genes come in a second, in rows of 2,048; the first epoch of each is left out."""
    print("\n| tokens of all cores, decoding counted | million tokens/s | cells/s |\n|---|---|---|")
    for output, label in {"ranks": "RankTokens", "bins": "BinnedExpression"}.items():
        args = ("tokens", stores(setup)[OURS], "--output", output, "--epochs", str(1 + setup.epochs))
        runs = [line for _ in range(setup.repeats) for line in run(ours(*args))[0][1:]]
        rates = [[line[f"{what}_per_s"] for line in runs] for what in ("tokens", "cells")]
        print(f"| {label} | {spread([rate / 1e6 for rate in rates[0]])} | {spread(rates[1])} |")


def print_orders(setup: Setup) -> None:
    """Print how long epochs over 100 million rows take to start, and the memory that takes; weights are counted."""
    print("\n| start of an epoch over 100M rows | first, s | next, s | memory, MB |\n|---|---|---|---|")
    for name in ("random", "blocks", "full shuffle", "weighted"):
        runs = [run(ours("order", name))[0] for _ in range(setup.repeats)]
        first, second = ([lines[epoch]["seconds"] for lines in runs] for epoch in (0, 1))
        memory = [lines[1]["n_bytes"] / 1e6 for lines in runs]
        print(f"| {name} | {spread(first)} | {spread(second)} | {spread(memory)} |")


def print_build_bounds(setup: Setup, folder: Path) -> None:
    """Print what a build cannot avoid."""
    print("\n| a build has to | seconds | GB | GB/s |\n|---|---|---|---|")
    for line in run(ours("disks", folder, stores(setup)[OURS]))[0]:
        gb = line["n_bytes"] / 1e9
        print(f"| {line['what']} | {line['seconds']:.2f} | {gb:.2f} | {gb / line['seconds']:.2f} |")


def print_gather(setup: Setup, folder: Path) -> None:
    """Print processor time of the gather tasks of a build, beside that of encoding and writing its X alone."""
    print("\n| CPU ns a value | gather | encode and write | gather / that |\n|---|---|---|---|")
    for layout in ("open", "packed"):
        out = setup.work / "gather.zarr"
        args = ("gather", folder, out, "--dataset-size", str(setup.dataset_size), "--layout", layout)
        runs = [run(ours(*args))[0] for _ in range(setup.repeats)]
        fresh(out)
        bound, whole = ([line["seconds"] / line["values"] * 1e9 for line in at] for at in zip(*runs, strict=True))
        ratios = [w / b for w, b in zip(whole, bound, strict=True)]
        print(f"| {layout} | {spread(whole)} | {spread(bound)} | {spread(ratios)} |")


def print_bounds(setup: Setup, found: dict[str, dict[str, list[float]]]) -> None:
    """Print what an epoch cannot avoid on these cores, and which share of that rate each output reaches.

    The bound of an output is to decode all of X and to write the bytes of its batches, and nothing else: no reading
    ahead, no picking of rows, no obs.
    """
    print("\n| bound of an epoch | layout | decode, s | write batches, s | cells/s at most | reached | share |")
    print("|---|---|---|---|---|---|---|")
    for name, layout in ((OURS, "open"), (PACKED, "packed")):
        runs = [run(ours("bounds", stores(setup)[name]))[0] for _ in range(setup.repeats)]
        for output, label in OUTPUTS.items():
            decoding, writing = (seconds(runs, what) for what in ("decode", f"write {output}"))
            rate = found[name][f"{label}, cells/s"]
            n_obs = run_n_obs(runs)
            bound, reached = n_obs / (decoding + writing), statistics.median(rate)
            cells = [label, layout, f"{decoding:.2f}", f"{writing:.2f}", number(bound), number(reached)]
            print(f"| {' | '.join([*cells, f'{reached / bound:.0%}'])} |")


def seconds(runs: list[list[dict[str, float]]], what: str) -> float:
    """Return the median of one measurement."""
    return statistics.median(line["seconds"] for lines in runs for line in lines if line["what"] == what)


def run_n_obs(runs: list[list[dict[str, float]]]) -> float:
    """Return the cells of the collection that was measured."""
    return next(line["cells"] for lines in runs for line in lines if "cells" in line)


def main() -> int:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="folder with bench/make_atlas.py")
    parser.add_argument("--atlas", default="", help="folder of files at the full scale; made if not given")
    parser.add_argument("--atlas-small", default="", help="the same at a quarter of it")
    parser.add_argument("--scale", type=float, default=1.0, help="cells of the made atlas (1.0: 171,792)")
    parser.add_argument("--annbatch-python", default="", help="a Python that can import annbatch")
    parser.add_argument("--work", type=Path, default=Path("bench_data"), help="folder for everything written")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--epochs", type=int, default=3, help="epochs that count, of each loader run; a cold one comes before them"
    )
    parser.add_argument("--dataset-size", type=int, default=100_000)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    python = find_annbatch(args.annbatch_python)
    setup = Setup(args.shared, args.work, python, args.repeats, args.epochs, args.dataset_size)
    if python is None:
        print(f"annbatch is not importable in {args.annbatch_python or 'this Python'}: measuring {OURS} alone")
    small, full = args.scale / 4, args.scale
    folders = {small: atlas(setup, small, args.atlas_small), full: atlas(setup, full, args.atlas)}
    found = bench_shuffle(setup, folders[full])
    for name, values in bench_load(setup).items():
        found[name] |= values
    print_table(found)
    print_bounds(setup, found)
    bench_consumer(setup)
    print_ranks(setup)
    print_python(setup)
    print_tokens(setup)
    print_orders(setup)
    print_scaling(setup, folders)
    print_build_bounds(setup, folders[full])
    print_gather(setup, folders[small])
    print("\nopening files lazily, and counting cells by type", flush=True)
    for n_files in (10, 100):  # the peer ends with ten
        command = [sys.executable, str(HERE / "lazy.py"), str(setup.work / "lazy"), "--files", str(n_files)]
        subprocess.run(command, check=True)
    print_far(setup)
    return 0


def print_far(setup: Setup) -> None:
    """Print what a store with latency costs a loader and a build, beside this disk."""
    command = [sys.executable, str(HERE / "far.py"), "load", "slow", "build", "--work", str(setup.work / "far")]
    lines, _ = run([*command, "--cells", "100000", "--epochs", "3", "--files-built", "1"])
    print("\nan S3 server on loopback that answers late, 128 requests at a time; epochs by turns, without the first")
    print("| ms | epoch | cells/s | requests | most at once | processor |\n|---|---|---|---|---|---|")
    for line in (line for line in lines if line["what"] == "load"):
        ms, epoch, rate = line["ms"], line["epoch"], line["cells_per_s"]
        print(f"| {ms} | {epoch} | {rate:,} | {line['n_requests']} | {line['n_at_once']} | {line['cpu_s']} s |")
    for line in (line for line in lines if line["what"] == "rate"):
        print(f"{line['ms']} ms: {line['cells_per_s']:,} cells/s, {line['of_disk']:.0%} of the disk's {line['shares']}")
        print(f"  processor: {line['us_a_cell']} us a cell, and {line['server_us']} of the server")
    for line in (line for line in lines if line["what"] == "slow"):
        print(f"{line['n_slow']} request of 5 s: epoch {line['s']} s, longest wait for a batch {line['longest_s']} s")
    print("\n| files and collection there, ms | | s | requests | most at once |\n|---|---|---|---|---|")
    for line in (line for line in lines if line["what"] in ("build", "verify")):
        facts = [line[fact] for fact in ("ms", "what", "s", "n_requests", "n_at_once")]
        print(f"| {' | '.join(map(str, facts))} |")


if __name__ == "__main__":
    sys.exit(main())
