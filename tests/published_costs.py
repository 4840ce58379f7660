"""What is published of the models' sizes: million parameters, and billion multiply-accumulates of one forward pass."""

# arXiv 2212.09748, table 4, with the fixed position table of 256 pixels; GMAC at 256 and at 512 pixels.
DIT = {
    "S/8": (33.15, 0.36, 1.43), "S/4": (32.95, 1.41, 6.07), "S/2": (32.96, 6.07, 31.44),
    "B/8": (130.88, 1.42, 5.59), "B/4": (130.48, 5.56, 23.03), "B/2": (130.51, 23.01, 106.4),
    "L/8": (458.59, 5.01, 19.73), "L/4": (458.05, 19.70, 80.74), "L/2": (458.10, 80.71, 361.0),
    "XL/8": (675.68, 7.39, 29.09), "XL/4": (675.07, 29.05, 118.7), "XL/2": (675.13, 118.64, 524.6),
}  # fmt: skip

# The same paper: the blocks of XL/2 at 256 pixels.
BLOCKS = {
    "in_context": (449.5, 119.37),
    "cross_attention": (598.3, 137.62),
    "adaln": (600.7, 118.56),
    "adaln_zero": (675.1, 118.64),
}

# SiT (arXiv 2401.08740) has DiT's networks.
SIT = {name: (params, gmac) for name, (params, gmac, _) in DIT.items() if name.endswith("/2")}

# LightningDiT-XL/1 (arXiv 2501.01423), with the fixed position table as DiT's.
LIGHTNING_XL1 = (674_961_824 + 294_912) / 1e6

# Latent DiffiT (arXiv 2312.02139), trainable parameters alone, by size and side of the latent. The paper has XL/2;
# the others have DiT's depths and widths.
DIFFIT = {
    ("S/2", 32): (27.3, 6.05),
    ("B/2", 32): (108.0, 22.98),
    ("L/2", 32): (380.5, 80.6),
    ("XL/2", 32): (561.0, 118.5),
    ("XL/2", 64): (562.4, 524.4),
}

# Image-space DiffiT, all of which is trainable: sizes that follow from our choices.
DIFFIT_IMAGE = {"cifar10": (29.8, 7.7), "ffhq64": (46.4, 33.8)}


def rounding(printed: float) -> float:
    """Half a unit of the second decimal where that is more than 0.5 %, as in the one GMAC below 1 (S/8: 0.36)."""
    return 0.005 if printed < 1 else 0.0
