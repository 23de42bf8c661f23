"""Step: gate, up and down of all experts each in one matrix, and the shared expert beside the block."""

from dataclasses import replace

from coterie.model.family import Dense, Family, Layout

HUB = Layout.under(
    "moe.",
    rows=("router_bias",),
    fused=("gate_proj.weight", "up_proj.weight", "down_proj.weight"),
)
HUB = replace(HUB, blocks=(*HUB.blocks, "share_expert."), shared=("share_expert.",))
SAVED = Layout.under("mlp.", rows=("gate.e_score_correction_bias",))
TYPES = Dense("types", "mlp_layer_types")

FAMILIES = (
    Family(("step3p7",), layouts=(HUB, SAVED), dense=TYPES),
    Family(("step3p5",), layouts=(HUB,), stock=False),  # the text model alone: remote code only
)
