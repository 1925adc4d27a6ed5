import math

from .run_folder import RunFolder
from .telemetry import plot_geometry as plot_geometry


def plot_losses(
    folder: RunFolder, compressors: dict[str, float], *, bytes_per_token: float
) -> None:
    """loss.png: training and validation loss against tokens, and what compressors make of the validation split, in bits per byte."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    records = folder.metrics()
    trained = [(r["tokens"], r["loss"]) for r in records if "loss" in r]
    validated = [(r["tokens"], r["val_loss"]) for r in records if "val_loss" in r]
    axes.plot(
        *zip(*trained, strict=True),
        color="tab:blue",
        alpha=0.35,
        linewidth=1,
        label="training batch",
    )
    span = max(1, len(trained) // 10)  # of a running mean
    if span > 1:
        means = [
            (n, sum(x for _, x in trained[i + 1 - span : i + 1]) / span)
            for i, (n, _) in enumerate(trained)
            if i + 1 >= span
        ]
        axes.plot(
            *zip(*means, strict=True),
            color="tab:blue",
            linewidth=2,
            label=f"mean of the last {span} logged",
        )
    if validated:
        axes.plot(
            *zip(*validated, strict=True),
            "o",
            color="tab:red",
            label=f"validation: {validated[-1][1]:.3f}",
        )
    nats = math.log(2) * bytes_per_token
    for (name, bits), shade in zip(compressors.items(), ("0.7", "0.5", "0.3"), strict=False):
        axes.axhline(
            bits * nats,
            color=shade,
            linestyle="--",
            linewidth=1,
            label=f"{name}: {bits * nats:.3f}",
        )
    axes.set(xlabel="tokens trained on", ylabel="loss, nats per token", title=folder.path.name)
    axes.set_yscale("log")
    for axis in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        axis("{x:.2g}")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(folder.path / "loss.png", dpi=120)
    plt.close(figure)
