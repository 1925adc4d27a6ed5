"""nanoGPT's CPU README command against a configuration of ours, alternately.

    git clone https://github.com/karpathy/nanoGPT
    python -m benchmarks.nanogpt_shakespeare --nanogpt nanoGPT --text input.txt \\
        --config configs/shakespeare_speedrun.toml --pairs 5 --first-seed 10

--text is prepared for both. A pair is one run of each. nanoGPT's command runs to its end, and its
final weights are scored on the whole validation split. Then our configuration runs with this pair's
seed, for --steps steps if given: a horizon whose end loss is to pass nanoGPT's.

Training clocks: nanoGPT's own per-iteration times (those of iterations that evaluate replaced by
the median), ours from summary.json. It prints each pair, the median of the ratios, how many pairs
pass, and whether the mean of our losses passes the rule (target − mean) · √n ≥ threshold at the
mean of nanoGPT's (one seed, and so one loss), with σ from our runs.
"""

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from studies.statistics import Rule, pooled, threshold_at

ROOT = Path(__file__).parent.parent
README_COMMAND = (
    "train.py config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 "
    "--log_interval=1 --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 "
    "--max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"
)
SCORE = """
import sys; sys.path.insert(0, {nanogpt!r})
import numpy as np, torch
from model import GPT, GPTConfig
saved = torch.load("out-shakespeare-char/ckpt.pt", weights_only=False)
model = GPT(GPTConfig(**saved["model_args"])); model.load_state_dict(saved["model"]); model.eval()
sys.path.insert(0, {root!r})
from data.loader import validation_batches
val = np.fromfile("data/shakespeare_char/val.bin", dtype=np.uint16)
total = count = 0
with torch.no_grad():
    for x, y in validation_batches([val], block_size=64, batch_size=128):
        loss = model(x, y)[1]
        n = int((y >= 0).sum()); total += loss.item() * n; count += n
print("score", saved["iter_num"], total / count)
"""


def theirs(checkout: Path) -> dict[str, float]:
    """Run the README's command in a checkout; return its training seconds and its final loss."""
    # --always_save_checkpoint only has the last weights scored instead of the best.
    command = [sys.executable, *README_COMMAND.split(), "--always_save_checkpoint=True"]
    out = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=True).stdout
    times = [float(t) for t in re.findall(r"iter \d+: loss [\d.]+, time ([\d.]+)ms", out)]
    middle = statistics.median(times)
    seconds = sum(middle if i % 250 == 0 else t for i, t in enumerate(times)) / 1e3
    score = SCORE.format(nanogpt=str(checkout), root=str(ROOT))
    out = subprocess.run(
        [sys.executable, "-c", score], cwd=checkout, capture_output=True, text=True, check=True
    ).stdout
    _, iteration, loss = out.splitlines()[-1].split()
    assert iteration == "2000", f"the last checkpoint is of iteration {iteration}"
    return {"seconds": seconds, "loss": float(loss)}


def ours(config: Path, folder: Path, seed: int, steps: int | None) -> dict[str, float]:
    """Run our configuration; return its training and wall seconds and its final loss."""
    name = f"seed{seed}"
    options = ["--run.dir", str(folder), "--run.name", name, "--run.seed", str(seed)]
    options += ["--train.sample-tokens", "0"]
    if steps:
        options += ["--train.steps", str(steps)]
    subprocess.run(
        [sys.executable, "train_gpt.py", str(config), *options],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    summary = json.loads((folder / name / "summary.json").read_text())
    return {
        "seconds": summary["train_seconds"],
        "wall": summary["wall_seconds"],
        "loss": summary["val_loss"],
    }


def verdict(peer: list[float], own: list[float]) -> str:
    """Return how many pairs pass, and whether the mean of our losses passes the rule."""
    n, target, mean = len(own), statistics.mean(peer), statistics.mean(own)
    passing = sum(b <= a for a, b in zip(peer, own, strict=True))
    text = f"{passing} of {n} pairs pass; mean loss, nanoGPT {target:.4f}, ours {mean:.4f}: "
    noise = pooled([np.array(own)])
    if noise is None:
        return text + "one pair tells no σ, and so no rule"
    rule = Rule(target, threshold_at(noise, n))
    return text + (
        f"(target − mean)·√n = {rule.statistic(mean, n):.4f}, "
        f"{'passes' if rule.passes(mean, n) else 'misses'} the rule's {rule.threshold:.4f}"
    )


def prepared_checkout(nanogpt: Path, text: Path, scratch: Path) -> Path:
    """Return a copy of nanoGPT's checkout with the text prepared, and prepare it for us too."""
    prepare = [sys.executable, "-m", "data.prepare", "shakespeare", "--file", str(text.resolve())]
    subprocess.run(prepare, cwd=ROOT, check=True)
    checkout = scratch / "nanoGPT"
    shutil.copytree(nanogpt, checkout, ignore=shutil.ignore_patterns(".git"))
    shutil.copy(text, checkout / "data/shakespeare_char/input.txt")
    prepare = [sys.executable, "data/shakespeare_char/prepare.py"]
    subprocess.run(prepare, cwd=checkout, check=True, capture_output=True)
    return checkout


def main() -> None:
    """Run the pairs, and print them and the verdict."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--nanogpt", type=Path, required=True, help="a checkout of karpathy/nanoGPT"
    )
    parser.add_argument("--text", type=Path, required=True, help="tinyshakespeare's input.txt")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "shakespeare_char.toml")
    parser.add_argument("--steps", type=int, help="of ours; the configuration's if left out")
    parser.add_argument("--first-seed", type=int, default=0)
    args = parser.parse_args()
    pairs = []
    with tempfile.TemporaryDirectory() as scratch:
        checkout = prepared_checkout(args.nanogpt, args.text, Path(scratch))
        for pair in range(args.pairs):
            a = theirs(checkout)
            b = ours(args.config.resolve(), Path(scratch), args.first_seed + pair, args.steps)
            pairs.append((a, b))
            print(
                f"pair {pair}: nanoGPT {a['loss']:.4f} in {a['seconds']:.1f} s | "
                f"ours {b['loss']:.4f} in {b['seconds']:.2f} s "
                f"({'passes' if b['loss'] <= a['loss'] else 'misses'}; wall {b['wall']:.1f} s)",
                flush=True,
            )
    ratios = [a["seconds"] / b["seconds"] for a, b in pairs]
    print(
        f"training time, nanoGPT / ours: median {statistics.median(ratios):.2f} "
        f"of n = {len(ratios)} ({min(ratios):.2f} … {max(ratios):.2f})"
    )
    print(verdict([a["loss"] for a, _ in pairs], [b["loss"] for _, b in pairs]))


if __name__ == "__main__":
    main()
