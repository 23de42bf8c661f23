"""Shared experts, a bias that only selects, and routing limited to groups: DeepSeek and those who follow it."""

from dataclasses import replace

from coterie.model.family import Dense, Family, Layout

LAYOUT = Layout.under(
    "mlp.",
    rows=(
        "gate.e_score_correction_bias",
        "gate.expert_bias",
        "e_score_correction_bias",
        "experts.e_score_correction_bias",
    ),
    whole=("post_mlp_layernorm.",),
)
KIMI = Layout.under(
    "block_sparse_moe.", rows=("gate.e_score_correction_bias",), fused=(), gate="w1", up="w3", down="w2"
)
# Routed experts work in a smaller space, with projections and a norm around them.
KIMI_K3 = replace(KIMI, whole=("block_sparse_moe.routed_expert_",))
MINIMAX = replace(KIMI, rows=("block_sparse_moe.e_score_correction_bias",))
# As published the block has no name of its own.
MISTRAL = Layout(("gate.", "experts.", "shared_experts."), fused=(), gate="w1", up="w3", down="w2")
# The first layers route by a table of token ids instead of a router's choice.
HASHED = Layout.under("ffn.", rows=("gate.bias",), tables=("gate.tid2eid",), fused=(), gate="w1", up="w3", down="w2")
HASHED_SAVED = Layout.under("mlp.", rows=("gate.e_score_correction_bias",), tables=("gate.tid2eid",))

FIRST = Dense("prefix", "first_k_dense_replace")
TYPES = Dense("types", "mlp_layer_types")
WITH_TYPES = tuple(
    """
    deepseek_v32 axk1 beam dots3_note_text exaone_moe glm4_moe_lite glm5_next glm_moe_dsa hy_v4 laguna mimo_v2_flash
    """.split()
)
THIRD_PARTY = ("kimi_k2", "bailing_moe", "bailing_moe_v2", "deepseek_vl_v2")

FAMILIES = (
    # Remote code only; softmax and plain top-k.
    Family(("deepseek",), stock=False, dense=FIRST),
    Family(("deepseek_v2",), min_per_group=1, group_switch=("topk_method", "group_limited_greedy"), dense=FIRST),
    Family(
        ("deepseek_ocr2", "unlimited_ocr"),
        min_per_group=1,
        group_switch=("topk_method", "group_limited_greedy"),
        dense=TYPES,
    ),
    Family(("deepseek_v3", "dots1", "glm4_moe", "glm4v_moe", "kimi_k25", "mistral4"), layouts=(LAYOUT,), dense=FIRST),
    Family(WITH_TYPES, layouts=(LAYOUT,), dense=TYPES),
    # A dense layer's norm is another one (axk2), its MLP is stored otherwise, or there is none.
    Family(("axk2", "minimax_m3_vl_text", "solar_open"), layouts=(LAYOUT,)),
    Family(("minimax_m3_vl",), layouts=(MINIMAX, LAYOUT)),
    Family(
        ("kimi_k3",),
        layouts=(KIMI_K3,),
        group_keys=("num_expert_group", "topk_group"),
        stock=False,
        dense=FIRST,
    ),
    Family(("mistral_large4",), layouts=(MISTRAL, LAYOUT), dense=TYPES),
    # Remote code only. Ling and Ring: softmax without groups, and (v2) sigmoid with them.
    *(Family((model_type,), layouts=(LAYOUT,), stock=False, dense=FIRST) for model_type in THIRD_PARTY),
    Family(("bailing_hybrid",), layouts=(LAYOUT,), group_keys=("num_expert_group", "topk_group"), dense=TYPES),
    Family(("kimi_linear",), layouts=(KIMI, LAYOUT), group_keys=("num_expert_group", "topk_group"), dense=TYPES),
    Family(("deepseek_v4",), layouts=(HASHED, HASHED_SAVED)),
)
