"""diffusers' DiTTransformer2DModel with the weights of ours."""

from diffusers import DiTTransformer2DModel
from torch import nn

from dit.convert.diffusers import to_diffusers
from dit.models.dit import DiT
from dit.models.layers import NORM_EPS

NULL = 1000
"""The label that diffusers' `DiTPipeline` gives where there is to be no class: that of ImageNet's models."""


def diffusers_dit(model: DiT, norm_eps: float = NORM_EPS) -> DiTTransformer2DModel:
    """An unchanged model of diffusers, except for the epsilon of its norms, with copies of our weights."""
    config, weights = to_diffusers(model.config, model.state_dict())
    peer = DiTTransformer2DModel.from_config(config | {"norm_eps": norm_eps})
    missing, unexpected = peer.load_state_dict(weights, strict=False)
    if unexpected or not set(missing) <= {"pos_embed.pos_embed"}:
        raise ValueError(f"diffusers' model has other weights: {missing} are missing, {unexpected} unknown")
    return peer


def set_differences(peer: DiTTransformer2DModel) -> DiTTransformer2DModel:
    """Let it compute the same as ours: the paper's timestep frequencies, and no label dropout inside the model."""
    for block in peer.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
        block.norm1.emb.class_embedder.dropout_prob = 0
    return peer


def set_null_class(peer: DiTTransformer2DModel) -> DiTTransformer2DModel:
    """Let it take `NULL` for no class, as its pipeline does for any number of classes."""
    for block in peer.transformer_blocks:
        embedder = block.norm1.emb.class_embedder
        weights = embedder.embedding_table.weight.data
        table = nn.Embedding(NULL + 1, weights.shape[1]).to(weights)
        table.weight.data[: len(weights) - 1] = weights[:-1]
        table.weight.data[NULL] = weights[-1]
        embedder.embedding_table = table
    return peer
