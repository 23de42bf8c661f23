"""Sigmoid or biased routers under names of their own: selection biases stand in odd places."""

from dataclasses import replace

from coterie.model.family import Dense, Family, Layout

AFMOE = Layout.under("mlp.", router="router.gate.weight", rows=("expert_bias",))
HY_V3 = replace(AFMOE, shared=("mlp.shared_mlp.",))
HY_V3_SAVED = Layout.under("mlp.", rows=("gate.e_score_correction_bias", "e_score_correction_bias"))
ERNIE = Layout.under("mlp.", rows=("moe_statics.e_score_correction_bias", "gate.moe_statics.e_score_correction_bias"))
# One bias stands outside the block.
KOLIBRI = replace(
    Layout.under("mlp."),
    blocks=("mlp.", "moe."),
    rows=("moe.router.expert_bias", "mlp.gate.e_score_correction_bias"),
)
LFM2 = Layout.under("feed_forward.", rows=("expert_bias",), gate="w1", up="w3", down="w2")
NEMOTRON = Layout.under(
    "mixer.",
    rows=("gate.e_score_correction_bias",),
    fused=("experts.up_proj", "experts.down_proj"),
    whole=("fc1_latent_proj.", "fc2_latent_proj."),
    gate=None,
)

FIRST = "num_dense_layers"

FAMILIES = (
    Family(("afmoe",), layouts=(AFMOE,), dense=Dense("prefix", FIRST)),
    Family(("hy_v3",), layouts=(HY_V3, HY_V3_SAVED), dense=Dense("types", "mlp_layer_types")),
    Family(("ernie4_5_moe",), layouts=(ERNIE,)),
    Family(("kolibri1",), layouts=(KOLIBRI,)),
    Family(("lfm2_moe",), layouts=(LFM2,), dense=Dense("prefix", FIRST, "feed_forward.", ("w1", "w3", "w2"))),
    Family(("nemotron_h",), layouts=(NEMOTRON,)),
)
