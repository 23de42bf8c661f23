"""Shared experts, a bias that only selects, and routing limited to groups: DeepSeek and those who follow it."""

from coterie.family import Family, Layout

BIASES = (
    "mlp.gate.e_score_correction_bias",
    "mlp.gate.expert_bias",
    "mlp.e_score_correction_bias",
    "mlp.experts.e_score_correction_bias",
)
LAYOUT = Layout(rows=BIASES, whole=("mlp.post_mlp_layernorm.",))

FAMILIES = (
    # Remote code only; softmax and plain top-k.
    Family(("deepseek",), stock=False),
    Family(("deepseek_v2",), min_per_group=1, group_switch=("topk_method", "group_limited_greedy")),
    Family(
        (
            "deepseek_v3",
            "deepseek_v32",
            "axk1",
            "axk2",
            "beam",
            "dots1",
            "dots3_note_text",
            "exaone_moe",
            "glm4_moe",
            "glm4_moe_lite",
            "glm_moe_dsa",
            "hy_v4",
            "laguna",
            "mimo_v2_flash",
            "minimax_m3_vl_text",
            "solar_open",
        ),
        layouts=(LAYOUT,),
    ),
    Family(("kimi_k2",), layouts=(LAYOUT,), stock=False),
    Family(("bailing_hybrid",), layouts=(LAYOUT,), group_keys=("num_expert_group", "topk_group")),
    Family(
        ("kimi_linear",),
        layouts=(
            Layout(
                blocks=("block_sparse_moe.",),
                router="block_sparse_moe.gate.weight",
                rows=("block_sparse_moe.gate.e_score_correction_bias",),
                experts="block_sparse_moe.experts.",
                fused=(),
                shared=("block_sparse_moe.shared_experts.",),
                gate="w1",
                up="w3",
                down="w2",
            ),
            LAYOUT,
        ),
        group_keys=("num_expert_group", "topk_group"),
    ),
    # The first layers route by a table of token ids instead of a router's choice.
    Family(
        ("deepseek_v4",),
        layouts=(
            Layout(
                blocks=("ffn.",),
                router="ffn.gate.weight",
                rows=("ffn.gate.bias",),
                experts="ffn.experts.",
                fused=(),
                shared=("ffn.shared_experts.",),
                tables=("ffn.gate.tid2eid",),
                gate="w1",
                up="w3",
                down="w2",
            ),
            Layout(rows=("mlp.gate.e_score_correction_bias",), tables=("mlp.gate.tid2eid",)),
        ),
    ),
)
