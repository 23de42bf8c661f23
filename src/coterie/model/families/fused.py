"""Families whose hub files hold all experts of a layer in one tensor."""

from dataclasses import replace

from coterie.model.family import Dense, Family, Layout

LINEARS = ("input_linear.weight", "output_linear.weight")
GRANITE = Layout.under("block_sparse_moe.", router="router.layer.weight", fused=LINEARS)
GRANITE_SAVED = Layout.under("block_sparse_moe.", router="router.weight")

FAMILIES = (
    Family(
        ("granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared"),
        layouts=tuple(replace(layout, shared=("shared_mlp.",)) for layout in (GRANITE, GRANITE_SAVED)),
    ),
    Family(
        ("gpt_oss",),
        layouts=(
            Layout.under("mlp.", router="router.weight", rows=("router.bias",), transposed=True, interleaved=True),
        ),
    ),
    Family(
        ("llama4", "llama4_text"),
        layouts=(Layout.under("feed_forward.", router="router.weight", transposed=True),),
        dense=Dense("others", "moe_layers", "feed_forward.", width="intermediate_size_mlp"),
    ),
    Family(
        ("aria", "aria_text"),
        layouts=(
            Layout.under(
                "mlp.", router="router.weight", fused=("experts.fc1.weight", "experts.fc2.weight"), transposed=True
            ),
            Layout.under("mlp.", router="router.weight", transposed=True),
        ),
    ),
    Family(
        ("dbrx",),
        layouts=(
            Layout.under(
                "ffn.",
                router="router.layer.weight",
                fused=("experts.mlp.w1", "experts.mlp.v1", "experts.mlp.w2"),
                gate="w1",
                up="v1",
                down="w2",
            ),
        ),
        count=("ffn_config.moe_num_experts",),
        top_k=("ffn_config.moe_top_k",),
    ),
    # The experts stand in the layer itself, beside a dense MLP that always runs.
    Family(
        ("gemma4", "gemma4_text"),
        layouts=(
            replace(
                Layout.under(
                    "",
                    router="router.proj.weight",
                    rows=("router.per_expert_scale",),
                    whole=("router.scale",),
                    shared=("mlp.",),
                ),
                blocks=("experts.", "router."),
            ),
        ),
        top_k=("top_k_experts",),
    ),
    # Attention has experts of its own, chosen by a router of its own; one count rules both.
    Family(
        ("jetmoe",),
        layouts=(Layout.under("mlp.", router="router.layer.weight", fused=LINEARS, whole=("bias",)),),
        attention=(
            Layout.under(
                "self_attention.experts.",
                router="router.layer.weight",
                fused=LINEARS,
                experts="",
                whole=("bias",),
                gate=None,
            ),
        ),
    ),
)
