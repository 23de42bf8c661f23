"""Softmax routers with nothing but a weight, experts under one prefix: Qwen, OLMoE and those who follow them."""

from coterie.model.family import Dense, Family, Layout

FAMILIES = (
    Family(("qwen2_moe", "qwen3_moe", "qwen3_next", "flint"), dense=Dense("ids", "mlp_only_layers")),
    Family(("mellum",), dense=Dense("types", "mlp_layer_types")),
    # No dense layers, or (cohere2_moe) of the experts' own width alone.
    Family(("qwen3_5_moe", "qwen3_5_moe_text", "olmoe", "flex_olmo", "cohere2_moe")),
    Family(
        ("hunyuan_v1_moe",),
        layouts=(Layout.under("mlp.", router="gate.wg.weight", shared=("shared_mlp.",)),),
        per_layer=True,
    ),
    Family(("jamba",), layouts=(Layout.under("feed_forward.", router="router.weight"),)),
)
