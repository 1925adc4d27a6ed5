"""The modules of torch.nn that have weights, each in a small network with a loss."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests.configurations import CLASSES, INNER, B, Batch, D, Entry, T, V, labels, noise, tokens

MODULES: dict[str, Entry] = {}
H = 10  # of a recurrent module's state


class Network(nn.Module):
    """A module, the mean of its outputs over positions, and a classifier. axis: of the outputs' features."""

    def __init__(self, body: nn.Module, width: int, axis: int) -> None:
        super().__init__()
        self.body, self.axis = body, axis
        self.classifier = nn.Linear(width, CLASSES)

    def forward(self, *, labels: Tensor, **inputs: Tensor) -> Tensor:
        y = self.body(*inputs.values())
        y = y[0] if isinstance(y, tuple) else y
        y = y.movedim(self.axis, -1).reshape(len(labels), -1, self.classifier.in_features)
        return nn.functional.cross_entropy(self.classifier(y.tanh().mean(1)), labels)


class Loss(nn.Module):
    """A module of torch.nn that has a head and gives a loss, on what a map makes of the inputs."""

    def __init__(self, loss: nn.Module, width: int) -> None:
        super().__init__()
        self.map, self.loss = nn.Linear(D, width), loss

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        y = self.loss(self.map(x).tanh(), labels)
        return y if isinstance(y, Tensor) else y.loss


class Parameters(nn.Module):
    """Two linear maps that stand in a list of parameters, a bias in a dict of them, and one more map."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.ParameterList([torch.randn(12, D) / 5, torch.randn(16, 12) / 5])
        self.shifts = nn.ParameterDict({"bias": torch.zeros(16)})
        self.last = nn.Linear(16, 20)

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.maps:
            x = (x @ weight.T).tanh()
        return self.last(x + self.shifts["bias"])


def put(name: str, make: Callable[[], nn.Module], width: int, *inputs: Tensor, axis: int = -1) -> None:
    """Put a network around a module in MODULES. width: of its outputs."""

    def entry() -> tuple[nn.Module, Batch]:
        torch.manual_seed(0)
        batch = {f"input_{i}": x.clone() for i, x in enumerate(inputs)}
        return Network(make(), width, axis).train(), batch | {"labels": labels()}

    assert name not in MODULES
    MODULES[name] = entry


def after(first: Callable[[], nn.Module], then: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(first(), then())


def put_loss(name: str, make: Callable[[], nn.Module], width: int, classes: int) -> None:
    def entry() -> tuple[nn.Module, Batch]:
        torch.manual_seed(0)
        return Loss(make(), width).train(), {"x": noise(B, D), "labels": torch.arange(B) * 7 % classes}

    MODULES[name] = entry


def encoder_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(D, 4, INNER, dropout=0.0, activation="gelu", batch_first=True)


def decoder_layer() -> nn.Module:
    return nn.TransformerDecoderLayer(D, 4, INNER, dropout=0.0, activation="gelu", batch_first=True)


def orthogonal(way: str) -> nn.Module:
    return parametrizations.orthogonal(nn.Linear(D, 20), orthogonal_map=way)


ORTHOGONAL = ("householder", "matrix_exp", "cayley")
ROWS, SEQUENCE, MEMORY = noise(B, D), noise(B, T, D), noise(B, T - 2, D, seed=1)
put("Linear", lambda: nn.Linear(D, 20), 20, ROWS)
put("Bilinear", lambda: nn.Bilinear(D, 12, 20), 20, ROWS, noise(B, 12, seed=1))
put("Embedding", lambda: nn.Embedding(V, D), D, tokens())
put("EmbeddingBag", lambda: nn.EmbeddingBag(V, D), D, tokens())
put("ParameterList", Parameters, 20, ROWS)

for n, shape in ((1, (T,)), (2, (6, 5)), (3, (6, 5, 4))):
    x = noise(B, 12, *shape)
    for prefix in ("Conv", "ConvTranspose"):
        kind = getattr(nn, f"{prefix}{n}d")
        put(f"{prefix}{n}d", partial(kind, 12, 20, 3, stride=2), 20, x, axis=1)
        put(f"{prefix}{n}d groups", partial(kind, 12, 20, 3, groups=2), 20, x, axis=1)
        put(f"{prefix}{n}d depthwise", partial(kind, 12, 12, 3, groups=12), 12, x, axis=1)
    for prefix in ("BatchNorm", "InstanceNorm"):
        normalization = partial(getattr(nn, f"{prefix}{n}d"), 20, affine=True)
        put(f"{prefix}{n}d", after(partial(getattr(nn, f"Conv{n}d"), 12, 20, 1), normalization), 20, x, axis=1)
for kind in (nn.PReLU, nn.SyncBatchNorm, partial(nn.GroupNorm, 4), nn.LayerNorm, nn.RMSNorm):
    put(getattr(kind, "__name__", "GroupNorm"), after(partial(nn.Linear, D, 20), partial(kind, 20)), 20, ROWS)
put("LayerNorm of positions", after(partial(nn.Linear, D, 20), partial(nn.LayerNorm, [T, 20])), 20, SEQUENCE)

for kind in (nn.RNN, nn.LSTM, nn.GRU):
    name, one_way = kind.__name__, partial(kind, D, H, batch_first=True)
    put(name, one_way, H, SEQUENCE)
    put(f"{name} both ways, two layers", partial(one_way, num_layers=2, bidirectional=True), 2 * H, SEQUENCE)
put("LSTM proj_size", partial(nn.LSTM, D, H, proj_size=6, batch_first=True), 6, SEQUENCE)
put("RNNCell", partial(nn.RNNCell, D, H), H, ROWS, noise(B, H, seed=1))
put("GRUCell", partial(nn.GRUCell, D, H), H, ROWS, noise(B, H, seed=1))


class LSTMCell(nn.LSTMCell):
    def forward(self, x: Tensor, state: Tensor, cell: Tensor) -> Any:  # type: ignore[override]
        return super().forward(x, (state, cell))


put("LSTMCell", lambda: LSTMCell(D, H), H, ROWS, noise(B, H, seed=1), noise(B, H, seed=2))

put("MultiheadAttention", lambda: nn.MultiheadAttention(D, 4, batch_first=True), D, SEQUENCE, MEMORY, MEMORY)
put(
    "MultiheadAttention kdim, vdim, bias_kv",
    lambda: nn.MultiheadAttention(D, 4, kdim=12, vdim=20, add_bias_kv=True, batch_first=True),
    D,
    SEQUENCE,
    MEMORY[..., :12],
    MEMORY[..., :20],
)
put("TransformerEncoderLayer", encoder_layer, D, SEQUENCE)
put("TransformerDecoderLayer", decoder_layer, D, SEQUENCE, MEMORY)
put("TransformerEncoder", lambda: nn.TransformerEncoder(encoder_layer(), 2), D, SEQUENCE)  # type: ignore[arg-type]
put("TransformerDecoder", lambda: nn.TransformerDecoder(decoder_layer(), 2), D, SEQUENCE, MEMORY)  # type: ignore[arg-type]
put(
    "Transformer",
    lambda: nn.Transformer(D, 4, 1, 1, INNER, dropout=0.0, activation="gelu", batch_first=True),
    D,
    MEMORY,
    SEQUENCE,
)

put_loss("AdaptiveLogSoftmaxWithLoss", lambda: nn.AdaptiveLogSoftmaxWithLoss(20, V, [10, 30], div_value=2.0), 20, V)
put_loss("LinearCrossEntropyLoss", lambda: nn.LinearCrossEntropyLoss(12, CLASSES), 12, CLASSES)

put("spectral_norm", lambda: parametrizations.spectral_norm(nn.Linear(D, 20)), 20, ROWS)
put("weight_norm", lambda: parametrizations.weight_norm(nn.Linear(D, 20)), 20, ROWS)
for way in ORTHOGONAL:
    put(f"orthogonal, {way}", partial(orthogonal, way), 20, ROWS)
put("older spectral_norm", lambda: nn.utils.spectral_norm(nn.Linear(D, 20)), 20, ROWS)
put("older weight_norm", lambda: nn.utils.weight_norm(nn.Linear(D, 20)), 20, ROWS)
put(
    "weight_norm of a convolution",
    lambda: parametrizations.weight_norm(nn.Conv1d(12, 20, 3)),
    20,
    noise(B, 12, T),
    axis=1,
)


# ---- what torch.nn has

# Names that the __init__ of a module with weights uses.
MAKERS = {"Parameter", "UninitializedParameter", "_get_clones", "Linear", "MultiheadAttention", "TransformerEncoder"}
CONTAINERS = (nn.ParameterList, nn.ParameterDict)


def kinds_with_weights() -> list[type[nn.Module]]:
    """The classes of torch.nn whose __init__, or a base's, makes parameters or modules that have some."""
    kinds = [kind for kind in vars(nn).values() if inspect.isclass(kind) and issubclass(kind, nn.Module)]
    return [kind for kind in kinds if kind in CONTAINERS or MAKERS & _names_in_init(kind)]


def _names_in_init(kind: type[nn.Module]) -> set[str]:
    bases = [base for base in kind.__mro__ if issubclass(base, nn.Module) and base is not nn.Module]
    return {name for base in bases if "__init__" in vars(base) for name in base.__init__.__code__.co_names}
