"""Adapters of PEFT, which hang weights in dictionaries: <layer>.<kind>.<name of the adapter>.

Source: the layers of peft 0.21. O, I: fan-out and fan-in of the layer; r: rank; V: tokens.
"""

from torch import nn

from .norms import L1ToRMS, MaxEntry, Norm, RMSToRMS
from .sites import Place, Site
from .views import Transposed

GAINS = ("gain", None)  # one number for each entry, in as many dimensions as there are
MAP = ("hidden", RMSToRMS())
KINDS: dict[str, tuple[str, Norm | None]] = {  # the role of each kind, and its norm
    "ia3_l": GAINS,  # IA3: of outputs (O, 1), of inputs (1, I), of a convolution (1, C, 1, 1)
    "vera_lambda_b": GAINS,  # VeRA (O,); its projections are frozen
    "vera_lambda_d": GAINS,  # VeRA (r,)
    "lora_E": GAINS,  # AdaLoRA: singular values (r, 1)
    "lora_A": MAP,  # AdaLoRA (r, I); LoRA's are modules
    "lora_B": MAP,  # AdaLoRA (O, r)
    "lora_embedding_A": ("embedding", Transposed(L1ToRMS())),  # LoRA of an embedding (r, V)
    "lora_embedding_B": MAP,  # LoRA of an embedding (O, r)
    "trainable_tokens_delta": ("embedding", L1ToRMS()),  # rows of an embedding (tokens, O)
}


def place_adapter(site: Site) -> Place | None:
    """Return the place of a weight of an adapter; None of any other weight, and of other kinds."""
    if isinstance(site.module, nn.ParameterDict) and site.label in KINDS:
        role, norm = KINDS[site.label]
        return Place(role, norm or MaxEntry(site.weight.ndim))
    # DoRA: the length of each row of a weight, (O,), of convolutions (1, O, 1, 1).
    if any(kind.__name__ == "DoraLinearLayer" for kind in type(site.module).__mro__):
        return Place("gain", MaxEntry(site.weight.ndim))
    return None
