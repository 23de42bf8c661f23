"""Families whose hub files hold all experts of a layer in one tensor."""

from dataclasses import replace

from coterie.model.family import Dense, Family, Layout

LINEARS = ("input_linear.weight", "output_linear.weight")

GRANITE = Layout.under("block_sparse_moe.", router="router.layer.weight", fused=LINEARS)
GRANITE_SAVED = Layout.under("block_sparse_moe.", router="router.weight")
GPT_OSS = Layout.under("mlp.", router="router.weight", rows=("router.bias",), transposed=True, interleaved=True)
# As saved by others: one linear for every expert, in two lists.
GPT_OSS_LISTS = Layout.under(
    "mlp.",
    router="router.linear.weight",
    rows=("router.linear.bias",),
    lists=("gate_up_projs", "down_projs"),
    interleaved=True,
)
LLAMA4 = Layout.under("feed_forward.", router="router.weight", transposed=True)
ARIA_SAVED = Layout.under("mlp.", router="router.weight", transposed=True)
ARIA = replace(ARIA_SAVED, fused=("mlp.experts.fc1.weight", "mlp.experts.fc2.weight"))
DBRX = Layout.under(
    "ffn.",
    router="router.layer.weight",
    fused=("experts.mlp.w1", "experts.mlp.v1", "experts.mlp.w2"),
    gate="w1",
    up="v1",
    down="w2",
    transposed_down=True,
)
# The experts stand in the layer itself, beside a dense MLP that always runs.
GEMMA4 = replace(
    Layout.under("", router="router.proj.weight", rows=("router.per_expert_scale",), whole=("router.scale",)),
    blocks=("experts.", "router."),
    shared=("mlp.",),
)
JETMOE = Layout.under("mlp.", router="router.layer.weight", fused=LINEARS, whole=("bias",))
JETMOE_ATTENTION = Layout.under(
    "self_attention.experts.", router="router.layer.weight", fused=LINEARS, experts="", whole=("bias",), gate=None
)

FAMILIES = (
    Family(
        ("granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared"),
        layouts=tuple(replace(layout, shared=("shared_mlp.",)) for layout in (GRANITE, GRANITE_SAVED)),
    ),
    Family(("gpt_oss",), layouts=(GPT_OSS, GPT_OSS_LISTS)),
    Family(
        ("llama4", "llama4_text"),
        layouts=(LLAMA4,),
        dense=Dense("others", "moe_layers", "feed_forward.", width="intermediate_size_mlp"),
    ),
    Family(("aria", "aria_text"), layouts=(ARIA, ARIA_SAVED)),
    Family(("dbrx",), layouts=(DBRX,), count=("ffn_config.moe_num_experts",), top_k=("ffn_config.moe_top_k",)),
    Family(("gemma4", "gemma4_text"), layouts=(GEMMA4,), top_k=("top_k_experts",)),
    # Attention has experts of its own, chosen by a router of its own; one count rules both.
    Family(("jetmoe",), layouts=(JETMOE,), attention=(JETMOE_ATTENTION,)),
)
