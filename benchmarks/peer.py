"""diffusers' DiTTransformer2DModel with the weights of ours."""

from collections.abc import Mapping

from diffusers import DiTTransformer2DModel
from torch import Tensor

from dit.models.dit import DiT
from dit.models.layers import NORM_EPS


def as_diffusers(weights: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    """A conditional adaLN-Zero DiT's weights under diffusers' names; time and label are embedded in every block."""
    out = {f"pos_embed.proj.{kind}": weights[f"x_embedder.proj.{kind}"] for kind in ("weight", "bias")}
    for kind in ("weight", "bias"):
        out[f"proj_out_1.{kind}"] = weights[f"final_layer.adaLN_modulation.1.{kind}"]
        out[f"proj_out_2.{kind}"] = weights[f"final_layer.linear.{kind}"]
        for i in range(depth):
            ours, theirs = f"blocks.{i}.", f"transformer_blocks.{i}."
            for part, qkv in zip("qkv", weights[f"{ours}attn.qkv.{kind}"].chunk(3), strict=True):
                out[f"{theirs}attn1.to_{part}.{kind}"] = qkv
            out[f"{theirs}attn1.to_out.0.{kind}"] = weights[f"{ours}attn.proj.{kind}"]
            out[f"{theirs}ff.net.0.proj.{kind}"] = weights[f"{ours}mlp.fc1.{kind}"]
            out[f"{theirs}ff.net.2.{kind}"] = weights[f"{ours}mlp.fc2.{kind}"]
            out[f"{theirs}norm1.linear.{kind}"] = weights[f"{ours}adaLN_modulation.1.{kind}"]
            time = f"{theirs}norm1.emb.timestep_embedder.linear_"
            out[f"{time}1.{kind}"] = weights[f"t_embedder.mlp.0.{kind}"]
            out[f"{time}2.{kind}"] = weights[f"t_embedder.mlp.2.{kind}"]
            table = f"{theirs}norm1.emb.class_embedder.embedding_table.weight"
            out[table] = weights["y_embedder.embedding_table.weight"]
    return out


def diffusers_dit(model: DiT, norm_eps: float = NORM_EPS) -> DiTTransformer2DModel:
    """A model of diffusers as it comes, but for the epsilon of its norms, with copies of our weights."""
    config = model.config
    peer = DiTTransformer2DModel(
        num_attention_heads=config.heads,
        attention_head_dim=config.width // config.heads,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        num_layers=config.depth,
        sample_size=config.input_size,
        patch_size=config.patch_size,
        num_embeds_ada_norm=config.num_classes,
        norm_eps=norm_eps,
    )
    missing, unexpected = peer.load_state_dict(as_diffusers(model.state_dict(), config.depth), strict=False)
    if unexpected or not set(missing) <= {"pos_embed.pos_embed"}:
        raise ValueError(f"diffusers' model has other weights: {missing} are missing, {unexpected} unknown")
    return peer


def set_differences(peer: DiTTransformer2DModel) -> DiTTransformer2DModel:
    """Make it compute what ours does: the paper's timestep frequencies, and no labels dropped inside the model."""
    for block in peer.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
        block.norm1.emb.class_embedder.dropout_prob = 0
    return peer
