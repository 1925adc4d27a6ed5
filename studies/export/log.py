"""The log of a run that was, in the form of a script's log."""

from ..evidence import is_restored
from ..runs import metrics, summary
from .run import Run, commit_text

LINE = "=" * 100


def log_lines(run: Run) -> str:
    """Return versions, and metrics as the script logs them."""
    assert run.folder is not None
    end, steps = summary(run.folder), run.config.train.steps
    assert end is not None
    name = f"{run.name}, seed {run.config.run.seed}"
    if is_restored(run.folder):
        name += " (evaluations alone)"
    code = f"train_gpt.py of {commit_text(end['commit'], end['dirty'])}"
    machine = f"{end['device']} with world_size {end['world_size']}"
    lines = [f"Running PyTorch {end['torch']} on {machine}: {name}, by {code}", LINE]
    for r in metrics(run.folder):
        step, seconds = r["step"], r["train_seconds"]
        loss = f"val_loss:{r['val_loss']:.5f}" if "val_loss" in r else f"train_loss:{r['loss']:.6f}"
        times = f"train_time:{seconds:.3f}s step_avg:{1000 * seconds / max(1, step):.2f}ms"
        lines.append(f"step:{step}/{steps} {loss} {times}")
    return "\n".join(lines) + "\n"
