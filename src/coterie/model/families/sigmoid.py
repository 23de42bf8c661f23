"""Sigmoid or biased routers under names of their own: selection biases stand in odd places."""

from dataclasses import replace

from coterie.model.family import Dense, Family, Layout

FAMILIES = (
    Family(
        ("afmoe",),
        layouts=(Layout.under("mlp.", router="router.gate.weight", rows=("expert_bias",)),),
        dense=Dense("prefix", "num_dense_layers"),
    ),
    Family(
        ("hy_v3",),
        layouts=(
            Layout.under("mlp.", router="router.gate.weight", rows=("expert_bias",), shared=("shared_mlp.",)),
            Layout.under("mlp.", rows=("gate.e_score_correction_bias", "e_score_correction_bias")),
        ),
        dense=Dense("types", "mlp_layer_types"),
    ),
    Family(
        ("ernie4_5_moe",),
        layouts=(
            Layout.under(
                "mlp.",
                rows=("moe_statics.e_score_correction_bias", "gate.moe_statics.e_score_correction_bias"),
            ),
        ),
    ),
    # One bias stands outside the block.
    Family(
        ("kolibri1",),
        layouts=(
            replace(
                Layout.under("mlp."),
                blocks=("mlp.", "moe."),
                rows=("moe.router.expert_bias", "mlp.gate.e_score_correction_bias"),
            ),
        ),
    ),
    Family(
        ("lfm2_moe",),
        layouts=(Layout.under("feed_forward.", rows=("expert_bias",), gate="w1", up="w3", down="w2"),),
        dense=Dense("prefix", "num_dense_layers", "feed_forward.", ("w1", "w3", "w2")),
    ),
    Family(
        ("nemotron_h",),
        layouts=(
            Layout.under(
                "mixer.",
                rows=("gate.e_score_correction_bias",),
                fused=("experts.up_proj", "experts.down_proj"),
                whole=("fc1_latent_proj.", "fc2_latent_proj."),
                gate=None,
            ),
        ),
    ),
)
