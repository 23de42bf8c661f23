"""Sigmoid or biased routers under names of their own: selection biases stand in odd places."""

from dataclasses import replace

from coterie.model.family import Dense, Family, Layout, PerLayer

AFMOE = Layout.under("mlp.", router="router.gate.weight", rows=("expert_bias",))
HY_V3 = replace(AFMOE, shared=("mlp.shared_mlp.",))
HY_V3_SAVED = Layout.under("mlp.", rows=("gate.e_score_correction_bias", "e_score_correction_bias"))
ERNIE = Layout.under("mlp.", rows=("moe_statics.e_score_correction_bias", "gate.moe_statics.e_score_correction_bias"))
# Of each layer, text tokens see one stack of experts and image tokens another. Published, both are one list with two
# routers of columns and a matrix of biases; transformers saves each by itself.
TEXT = Layout.under(
    "mlp.", router="gate.weight", rows=("moe_statics.e_score_correction_bias",), fused=(), columns=True, segment=(0, 2)
)
IMAGE = replace(TEXT, router="mlp.gate.weight_1", shared=(), segment=(1, 2))
TEXT_SAVED, IMAGE_SAVED = (
    replace(Layout.under(f"mlp.{kind}_moe.", rows=("gate.moe_statics.e_score_correction_bias",)), shared=shared)
    for kind, shared in (("text", ("mlp.shared_experts.",)), ("vision", ()))
)
ERNIE_VL = Family(
    ("ernie4_5_vl_moe",),
    layouts=(TEXT, TEXT_SAVED),
    side="vision.",
    within=(IMAGE, IMAGE_SAVED),
    layers=PerLayer(entries=("mlp_layer_types",)),  # lists of sizes are of stacks
)
# One bias stands outside the block.
KOLIBRI = replace(
    Layout.under("mlp."),
    blocks=("mlp.", "moe."),
    rows=("moe.router.expert_bias", "mlp.gate.e_score_correction_bias"),
)
LFM2 = Layout.under("feed_forward.", rows=("expert_bias",), gate="w1", up="w3", down="w2")
# As published gate and up alternate; saved by transformers they stand one above the other.
INKLING = Layout.under("mlp.", rows=("gate.bias",), fused=("experts.w13_weight", "experts.w2_weight"), interleaved=True)
INKLING_SAVED = Layout.under("mlp.", rows=("gate.e_score_correction_bias",))
# Experts work in a space of their own, behind a projection and before another.
MUSE = replace(INKLING_SAVED, whole=("mlp.experts.post_expert_norm.", "mlp.pre_expert_", "mlp.post_expert_"))
# Some of the router's rows lead to the identity instead of an expert.
LONGCAT = Layout.under("mlp.", router="router.classifier.weight", rows=("router.e_score_correction_bias",))
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
    ERNIE_VL,
    replace(ERNIE_VL, model_types=("ernie4_5_moe_vl",), stock=False),  # as its remote code spells the config
    Family(("inkling2", "inkling2_text"), layouts=(INKLING, INKLING_SAVED)),
    Family(("muse_spark",), layouts=(MUSE,), dense=Dense("types", "mlp_layer_types")),
    Family(("kolibri1",), layouts=(KOLIBRI,)),
    Family(("lfm2_moe",), layouts=(LFM2,), dense=Dense("prefix", FIRST, "feed_forward.", ("w1", "w3", "w2"))),
    Family(("longcat_flash",), layouts=(LONGCAT,), zero_count="zero_expert_num"),
    Family(("nemotron_h",), layouts=(NEMOTRON,)),
)
