"""Softmax routers with nothing but a weight, experts under `mlp.experts`: Qwen, OLMoE and those who follow them."""

from coterie.family import Family, Layout

FAMILIES = (
    Family(("qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_moe", "qwen3_5_moe_text", "flint")),
    Family(("olmoe", "flex_olmo", "mellum", "cohere2_moe")),
    Family(
        ("hunyuan_v1_moe",),
        layouts=(Layout(router="mlp.gate.wg.weight", shared=("mlp.shared_mlp.",)),),
    ),
    Family(
        ("jamba",),
        layouts=(
            Layout(
                blocks=("feed_forward.",),
                router="feed_forward.router.weight",
                experts="feed_forward.experts.",
                fused=("feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"),
            ),
        ),
    ),
)
