"""What one training taught a network, added to another: student + share (tuned - teacher), weight by weight.

A teacher that was tuned after its student had been distilled hands on what it learned without another distillation
(task arithmetic, Ilharco et al. 2023): both differences are small and start from the same weights. With the network
before its tuning as both student and teacher, a share of 0.5 is the mean of before and after: what the tuning taught,
and little of what it made the network forget (WiSE-FT, Wortsman et al. 2022).
"""

from __future__ import annotations

import sys
from pathlib import Path

from cascade import checkpoint
from cascade.nets.unet_config import completed


def merge(out: Path, tuned: Path, student: Path, teacher: Path, share: float = 1.0) -> Path:
    """Writes the sum to `out`, with all that the student's weights say of themselves.

    Raises InputError if the three are not of one architecture.
    """
    parts = [checkpoint.load(path) for path in (tuned, student, teacher)]
    for part, path in zip(parts, (tuned, student, teacher), strict=True):
        checkpoint.compatible(completed(part.config["net"]), completed(parts[1].config["net"]), str(path))
    a, b, c = (part.state for part in parts)
    state = {name: b[name].float() + share * (a[name].float() - c[name].float()) for name in b}
    card = (
        f"# {parts[1].config['kind']}\n\nThe weights {parts[1].hash[:16]} and {share:g} of the difference of "
        f"{parts[0].hash[:16]} to {parts[2].hash[:16]}, by `cascade.merge`.\n\n"
        "Licence: Apache-2.0.\n"
    )
    return checkpoint.save(out, state, parts[1].config, card=card)


if __name__ == "__main__":
    target, *parts = map(Path, sys.argv[1:5])
    merge(target, parts[0], parts[1], parts[2], *map(float, sys.argv[5:6]))
