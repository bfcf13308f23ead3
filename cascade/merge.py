"""What one training taught a network, added to another: student + share (tuned - teacher), weight by weight.

A teacher that was tuned after its student had been distilled hands on what it learned without another distillation
(task arithmetic, Ilharco et al. 2023): both differences are small and start from the same weights. With the network
before its tuning as both student and teacher, a share of 0.5 is the mean of before and after: what the tuning taught,
and little of what it made the network forget (WiSE-FT, Wortsman et al. 2022).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cascade import checkpoint
from cascade.checkpoint import Weights
from cascade.errors import InputError
from cascade.nets.unet_config import completed


def nature(weights: Weights) -> dict[str, Any]:
    """What weights that are added must have in common. InputError for those of no stage."""
    config = weights.config
    if "net" not in config:
        raise InputError(f"weights {weights.hash[:16]}: are not those of a stage", fix="weights of a stage")
    prediction = config.get("diffusion", {}).get("prediction")
    return {"kind": config.get("kind"), "net": completed(config["net"]), "prediction": prediction}


def merge(out: Path, tuned: Path, student: Path, teacher: Path, share: float = 1.0) -> Path:
    """Writes the sum to `out`, with all that the student's weights say of themselves.

    Raises InputError if the three are not of one kind, architecture and prediction.
    """
    parts = [checkpoint.load(path) for path in (tuned, student, teacher)]
    for part, path in zip(parts, (tuned, student, teacher), strict=True):
        checkpoint.compatible(nature(part), nature(parts[1]), str(path))
        if other := part.state.keys() ^ parts[1].state.keys():
            raise InputError(f"weights {path}: have other tensors, such as {min(other)}", fix="weights of one network")
    a, b, c = (part.state for part in parts)
    state = {name: b[name].float() + share * (a[name].float() - c[name].float()) for name in b}
    card = (
        f"# {parts[1].config['kind']}\n\nThe weights {parts[1].hash[:16]} and {share:g} of the difference of "
        f"{parts[0].hash[:16]} to {parts[2].hash[:16]}, by `cascade.merge`.\n\n"
        "Licence: Apache-2.0.\n"
    )
    return checkpoint.save(out, state, parts[1].config, card=card)
