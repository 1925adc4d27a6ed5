"""What the process has loaded from which tests fork (tests/helpers.py): a child has it at once, and what a first call
alone has to do is done as well.
"""

import importlib
import io

for name in (
    "torch.distributed.device_mesh",
    "torch.distributed.fsdp",
    "torch.distributed.run",
    "torch.profiler._cupti_monitor",
    "safetensors.torch",
    "hypothesis",
    "pytest",
    "training.config",
    "training.checkpoint",
    "training.geometry",
    "training.sharpness",
    "training.plots",
    "training.runtime",
    "model",
    "data.prepare",
    "pytorch_optimizer",
    "studies.report.page",
    "studies.tuning",
    "studies.verdict",
):
    importlib.import_module(name)

pyplot = importlib.import_module("matplotlib.pyplot")
pyplot.switch_backend("Agg")
figure, axes = pyplot.subplots(layout="constrained")
axes.plot([1, 2], [1e-9, 1e9], label="finds the fonts")
axes.set(xlabel="x", title="$x^2$", yscale="log")
axes.legend()
figure.savefig(io.BytesIO())
pyplot.close(figure)
