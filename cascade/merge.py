"""What one training taught a network, added to another: student + tuned - teacher, weight by weight.

A teacher that was tuned after its student had been distilled hands on what it learned without another distillation
(task arithmetic, Ilharco et al. 2023): both differences are small and start from the same weights.
"""

from __future__ import annotations

import sys
from pathlib import Path

from cascade import checkpoint
from cascade.unet_config import completed


def merge(out: Path, tuned: Path, student: Path, teacher: Path) -> Path:
    """Writes the sum to `out`, with all that the student's weights say of themselves.

    Raises InputError if the three are not of one architecture.
    """
    parts = [checkpoint.load(path) for path in (tuned, student, teacher)]
    for part, path in zip(parts, (tuned, student, teacher), strict=True):
        checkpoint.compatible(completed(part.config["net"]), completed(parts[1].config["net"]), str(path))
    a, b, c = (part.state for part in parts)
    state = {name: b[name].float() + a[name].float() - c[name].float() for name in b}
    card = (
        f"# {parts[1].config['kind']}\n\nThe weights {parts[1].hash[:16]} and the difference of "
        f"{parts[0].hash[:16]} to {parts[2].hash[:16]}, by `cascade.merge`.\n\n"
        "Licence: Apache-2.0.\n"
    )
    return checkpoint.save(out, state, parts[1].config, card=card)


if __name__ == "__main__":
    merge(*map(Path, sys.argv[1:5]))
