"""Training steps in float32 against numbers that are kept here.

Of each small model the loss and the gradient's norm of four steps, as a CPU computes them. The tolerance lies between
what sums in another order may change and what a lower precision does. The largest of a model's eight relative
differences was

    4e-7    float32 from float64
    1e-5    (the tolerance)
    8e-5    with the factors of products rounded to 10 bits, as in TF32, for the model that shows it least
    4e-4    bfloat16, for the model that shows it least

``python -m dit.doctor.golden`` prints what is to be kept after a change of the numbers.
"""

import sys
from collections.abc import Sequence
from pprint import pformat

import torch

from dit.devices import arithmetic
from dit.doctor.devices import described
from dit.doctor.small import CASES, Case, steps
from storage.finding import Finding, failed, ok

STEPS = 4
TOLERANCE = 1e-5
KEPT: dict[str, list[tuple[float, float]]] = {
    "DiT": [
        (1.4524086713790894, 1.8634202480316162),
        (1.2901510000228882, 1.4096745252609253),
        (1.2277518510818481, 1.241126537322998),
        (1.142101764678955, 1.0529766082763672),
    ],
    "LightningDiT": [
        (2.344006061553955, 2.2302019596099854),
        (2.1840577125549316, 1.5209444761276245),
        (2.1540775299072266, 1.0481648445129395),
        (2.08337140083313, 0.8993439674377441),
    ],
    "DiffiT": [
        (1.1929956674575806, 1.609967589378357),
        (1.0080254077911377, 0.8398655652999878),
        (0.9983805418014526, 0.8616253733634949),
        (0.9383281469345093, 0.6174362301826477),
    ],
    "DiffiT on images": [
        (2.679497003555298, 3.2356770038604736),
        (2.432349920272827, 2.754011392593384),
        (2.4840617179870605, 1.8206140995025635),
        (2.2204651832580566, 1.6671898365020752),
    ],
}
"""Loss and norm of the gradient of each step."""


def check() -> Finding:
    """Whether this device computes the kept numbers."""
    gaps = {name: gap(measured(case), KEPT[name]) for name, case in CASES.items()}
    seen = f"{STEPS} steps of {len(CASES)} models in float32 on {described()}"
    wrong = [f"{name} by {value:.1g}" for name, value in gaps.items() if not value <= TOLERANCE]  # not if it is NaN
    if wrong:
        remedy = "do not train here: try another GPU of this machine, then another driver or torch"
        return failed(f"{seen} differ from what they must be: {', '.join(wrong)}; {TOLERANCE:g} is allowed", remedy)
    return ok(f"{seen}: losses as kept, within {max(gaps.values()):.1g}; {TOLERANCE:g} is allowed")


def measured(case: Case, autocast: torch.dtype | None = None) -> list[tuple[float, float]]:
    """Loss and norm of the gradient of each step, without TF32."""
    with arithmetic("float32"):
        return [(step.terms["loss"].item(), step.gradient_norm.item()) for step in steps(case, STEPS, autocast)]


def gap(found: Sequence[tuple[float, float]], kept: Sequence[tuple[float, float]]) -> float:
    """The largest relative difference; NaN if a number is."""
    pairs = torch.tensor([found, kept], dtype=torch.float64)
    return ((pairs[0] - pairs[1]).abs() / pairs[1]).max().item()


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.stdout.write(pformat({name: measured(case) for name, case in CASES.items()}, width=119) + "\n")
