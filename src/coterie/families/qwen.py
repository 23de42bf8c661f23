"""Softmax routers with nothing but a weight, experts under one prefix: Qwen, OLMoE and those who follow them."""

from coterie.family import Family, Layout

FAMILIES = (
    Family(("qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_moe", "qwen3_5_moe_text", "flint")),
    Family(("olmoe", "flex_olmo", "mellum", "cohere2_moe")),
    Family(("hunyuan_v1_moe",), layouts=(Layout.under("mlp.", router="gate.wg.weight", shared=("shared_mlp.",)),)),
    Family(("jamba",), layouts=(Layout.under("feed_forward.", router="router.weight"),)),
)
