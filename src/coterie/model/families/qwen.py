"""Softmax routers with nothing but a weight, experts under one prefix: Qwen, OLMoE and those who follow them."""

from coterie.model.family import Dense, Family, Layout

HUNYUAN = Layout.under("mlp.", router="gate.wg.weight", shared=("shared_mlp.",))

FAMILIES = (
    Family(
        ("qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_omni_moe_thinker", "flint"),
        dense=Dense("ids", "mlp_only_layers"),
    ),
    # Published with fused matrices (E, in, out), saved by transformers as (E, out, in), under the same names.
    Family(
        ("qwen3_vl_moe",),
        layouts=(Layout.under("mlp.", transposed=None),),
        dense=Dense("ids", "mlp_only_layers"),
    ),
    # Two models in one, of as many experts each: what the talker says is no text, so that it is cut by files alone.
    Family(("qwen3_omni_moe",), side="talker.", stock=False),
    Family(("mellum",), dense=Dense("types", "mlp_layer_types")),
    # No dense layers, or (cohere2_moe) of the experts' own width alone.
    Family(("qwen3_5_moe", "qwen3_5_moe_text", "olmoe", "flex_olmo", "cohere2_moe", "qwen4_exp", "qwen4_exp_text")),
    Family(("hunyuan_v1_moe",), layouts=(HUNYUAN,), per_layer=True),
    Family(("hunyuan",), layouts=(HUNYUAN,), per_layer=True, stock=False),  # Hunyuan-Large: remote code only
    Family(("jamba",), layouts=(Layout.under("feed_forward.", router="router.weight"),)),
)
