"""Families whose hub files hold all experts of a layer in one tensor."""

from coterie.family import Family, Layout

GRANITE = Layout(
    blocks=("block_sparse_moe.",),
    router="block_sparse_moe.router.layer.weight",
    fused=("block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight"),
    experts="block_sparse_moe.experts.",
    shared=("shared_mlp.",),
)
GRANITE_SAVED = Layout(
    blocks=("block_sparse_moe.",),
    router="block_sparse_moe.router.weight",
    fused=("block_sparse_moe.experts.gate_up_proj", "block_sparse_moe.experts.down_proj"),
    experts="block_sparse_moe.experts.",
    shared=("shared_mlp.",),
)

FAMILIES = (
    Family(
        ("granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared"),
        layouts=(GRANITE, GRANITE_SAVED),
    ),
    Family(
        ("gpt_oss",),
        layouts=(Layout(router="mlp.router.weight", rows=("mlp.router.bias",), transposed=True, interleaved=True),),
    ),
    Family(
        ("llama4", "llama4_text"),
        layouts=(
            Layout(
                blocks=("feed_forward.",),
                router="feed_forward.router.weight",
                experts="feed_forward.experts.",
                fused=("feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"),
                shared=("feed_forward.shared_expert.",),
                transposed=True,
            ),
        ),
    ),
    Family(
        ("aria", "aria_text"),
        layouts=(
            Layout(
                router="mlp.router.weight",
                fused=("mlp.experts.fc1.weight", "mlp.experts.fc2.weight"),
                transposed=True,
            ),
            Layout(router="mlp.router.weight", transposed=True),
        ),
    ),
    Family(
        ("dbrx",),
        layouts=(
            Layout(
                blocks=("ffn.",),
                router="ffn.router.layer.weight",
                experts="ffn.experts.",
                fused=("ffn.experts.mlp.w1", "ffn.experts.mlp.v1", "ffn.experts.mlp.w2"),
                gate="w1",
                up="v1",
                down="w2",
            ),
        ),
        count=("ffn_config.moe_num_experts",),
        top_k=("ffn_config.moe_top_k",),
    ),
    # A dense MLP runs beside the experts in the same layer.
    Family(
        ("gemma4", "gemma4_text"),
        layouts=(
            Layout(
                blocks=("experts.", "router."),
                router="router.proj.weight",
                rows=("router.per_expert_scale",),
                whole=("router.scale",),
                experts="experts.",
                fused=("experts.gate_up_proj", "experts.down_proj"),
                shared=("mlp.",),
            ),
        ),
        top_k=("top_k_experts",),
    ),
    # Attention has experts of its own, chosen by a router of its own; one count rules both.
    Family(
        ("jetmoe",),
        layouts=(
            Layout(
                router="mlp.router.layer.weight",
                fused=("mlp.input_linear.weight", "mlp.output_linear.weight"),
                whole=("mlp.bias",),
            ),
        ),
        attention=(
            Layout(
                blocks=("self_attention.experts.",),
                router="self_attention.experts.router.layer.weight",
                fused=("self_attention.experts.input_linear.weight", "self_attention.experts.output_linear.weight"),
                experts="self_attention.experts.",
                whole=("self_attention.experts.bias",),
                gate=None,
            ),
        ),
    ),
)
