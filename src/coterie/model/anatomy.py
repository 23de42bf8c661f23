"""What transformers makes of each decoder layer, from the config alone: whether two configs mean the same layers.

Importing this module imports torch.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from coterie.model.loading import decoder_layers, empty_stock
from coterie.model.own import OWN, own_layout
from coterie.storage.checkpoint import Checkpoint

NUMBERS = ("layer_idx", "layer_number", "layer_id", "training")  # of a module: what a layer's place changes by itself
SETTINGS = (bool, int, float, str, type(None), tuple)


def anatomies(checkpoint: Checkpoint) -> list[dict[str, object]]:
    """What distinguishes each decoder layer but its weights and its number: modules, shapes, settings and buffers.

    Raises: CoterieError when transformers does not build the model.
    """
    config, own = checkpoint.config, own_layout(checkpoint.config)
    if own.model_type:
        config = {key: value for key, value in config.items() if key != OWN} | {"model_type": own.model_type}
    advice = ", so whether layers keep their kinds cannot be told"
    model = empty_stock(replace(checkpoint, config=config), torch.float32, advice=advice)
    return [_anatomy(layer) for layer in decoder_layers(model.get_decoder(), str(checkpoint.path))]


def _anatomy(layer: torch.nn.Module) -> dict[str, object]:
    found: dict[str, object] = {}
    for path, module in layer.named_modules():
        settings = {k: v for k, v in vars(module).items() if not k.startswith("_") and k not in NUMBERS}
        found[path] = type(module).__name__, {k: v for k, v in settings.items() if isinstance(v, SETTINGS)}
        found |= {f"{path}.{name}": tuple(p.shape) for name, p in module.named_parameters(recurse=False)}
        found |= {f"{path}.{name}": b.tolist() for name, b in module.named_buffers(recurse=False)}
    return found
