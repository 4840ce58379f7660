"""What is done to a model block by block. The model does not know."""

from torch import nn


def blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of a model, in order: what lies in its lists that are called ``blocks``."""
    lists = (module for name, module in model.named_modules() if name.rpartition(".")[2] == "blocks")
    return [block for found in lists for block in found.children()]
