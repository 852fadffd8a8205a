"""The steps of gpu_run.sh that are Python: golden products, tuning, benchmarks, plots.

    python benchmarks/gpu_run.py [--rehearse] --folder OUT golden | tune | bench | plot

Every result is checked before it is timed; both precisions are named. `bench` times both backends of a convolution and
compares with cuDNN (contiguous and channels_last; fp32, TF32, fp16), cuSPARSE for 1 x 1 convolutions, and eager and
compiled PyTorch for the losses. `tune` and `bench` end within their time: what they then have not come to is named.
What its writers guessed before the first run is in results/guessed.json (the model of time is predict.py's).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from gpu_bench import bench
from gpu_cases import HERE, PRECISIONS, Layer, Run, tf32, two_of_four
from sparsekd.kernels import configs

from sparsekd.sparse import formats, formats_24, ops

TUNE_SECONDS = 75  # after which no new case is begun


def golden(run: Run) -> None:
    """Products of whole numbers are exact in every precision: any wrong place in a fragment shows."""
    found = {}
    for precision, dtype in (*PRECISIONS.items(), ("bf16", torch.bfloat16)):
        for backend in run.backends:
            with tf32(precision == "tf32"), ops.only_backend(backend):
                for vector in (8, 16) if run.rehearse else (8, 16, 32, 64, 128):
                    channels = 16 if run.rehearse else 128
                    weight = torch.randint(-3, 4, (max(vector, 16), channels, 1, 1)).double()
                    packed = formats.pack(weight, torch.ones_like(weight, dtype=torch.bool), vector, 1, False)
                    input = torch.randint(-3, 4, (2, channels, 4, 4)).double()
                    values, crow, col, rows = (None if t is None else t.to(run.device) for t in packed)
                    geometry = dict(out_channels=weight.shape[0], kernel_size=1, row_indices=rows)
                    got = ops.conv2d(input.to(run.device, dtype), values.to(dtype), crow, col, **geometry)
                    want = F.conv2d(input, weight).to(dtype)
                    found[f"{backend} {precision} V={vector}"] = bool(torch.equal(got.cpu(), want))
    for precision, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        weight, mask = torch.randint(-3, 4, (48, 128, 1, 1)).double(), two_of_four(48, 128, 1)
        input = torch.randint(-3, 4, (2, 128, 4, 4)).double()
        values, metadata = (t.to(run.device) for t in formats_24.pack_24(weight, mask))
        got = ops.conv2d_24(input.to(run.device, dtype), values.to(dtype), metadata, kernel_size=1)
        found[f"{precision} 2:4"] = bool(torch.equal(got.cpu(), F.conv2d(input, weight * mask).to(dtype)))
    run.write("golden.json", found)
    if not all(found.values()):
        raise SystemExit(f"Expected exact products, got {found}")


def tune(run: Run) -> None:
    """The tiles of each layer, as Triton's kernels would serve it."""
    found = {}
    cases = [(shape, *kind) for kind in run.kinds if kind[1] >= 8 for shape in run.layers]
    for shape, precision, vector in run.within(TUNE_SECONDS, cases):
        problems = []
        plain = configs.config_for

        def noted(problem, device, launch, problems=problems, plain=plain):
            problems.append(problem)
            return plain(problem, device, launch)

        with tf32(precision == "tf32"), ops.only_backend("triton"):
            layer = Layer(run, shape, precision, vector, run.densities[0])
            with mock.patch.object(configs, "config_for", noted):
                layer.check(precision)

            def with_config(config, layer=layer):
                with mock.patch.object(configs, "config_for", lambda problem, device, launch: config):
                    return layer.sparse()

            candidates, few = configs.candidates_conv2d, 2 if run.rehearse else 6
            with mock.patch.object(configs, "candidates_conv2d", lambda *a: candidates(*a)[:few]):  # noqa: B023
                best, seconds = configs.tune(
                    problems[0], run.device, with_config, lambda f: run.time({"it": f})["it"] / 1e3
                )
        tried = dict(zip(configs.names(seconds), seconds.values(), strict=True))
        found[f"{shape} {precision} V={vector}"] = dict(best=configs.names([best])[0], seconds=tried)
    run.write("tuned.json", found)


def plot(run: Run) -> None:
    """Speed-ups over the fastest dense engine, and what was guessed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = json.loads((run.folder / "results.json").read_text())
    guessed = json.loads((HERE / "results" / "guessed.json").read_text())["conv2d"]
    rows = found["results"]["conv2d"]
    names = list(dict.fromkeys(f"{r['precision']} V={r['vector']} at {r['density']:.0%}" for r in rows))
    figure, axes = pyplot.subplots(figsize=(10, 0.4 * len(names) + 2))
    for place, name in enumerate(names):
        mine = [r for r in rows if f"{r['precision']} V={r['vector']} at {r['density']:.0%}" == name]
        axes.plot([r["speedup"] for r in mine], [place] * len(mine), "o", color="tab:blue", alpha=0.7)
        if name in guessed:
            axes.plot(guessed[name], place, "|", color="tab:red", markersize=14)
    axes.set_yticks(range(len(names)), names)
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set_xlabel("times faster than cuDNN (the better layout); red: guessed")
    axes.set_title(f"conv2d, {found['device']}")
    figure.tight_layout()
    figure.savefig(run.folder / "results.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("golden", "tune", "bench", "plot"))
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--folder", type=Path, required=True)
    args = parser.parse_args()
    if not args.rehearse and not torch.cuda.is_available():
        raise SystemExit("Expected a GPU, or --rehearse; got neither")
    run = Run(args.rehearse, args.folder)
    with run.kernels():
        dict(golden=golden, tune=tune, bench=bench, plot=plot)[args.step](run)


if __name__ == "__main__":
    main()
