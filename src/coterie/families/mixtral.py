"""Mixtral's names: experts w1 (gate), w3 (up), w2 (down) under `block_sparse_moe`; also Snowflake Arctic."""

from coterie.family import Family, Layout

HUB = Layout(
    blocks=("block_sparse_moe.",),
    router="block_sparse_moe.gate.weight",
    rows=("block_sparse_moe.e_score_correction_bias",),
    experts="block_sparse_moe.experts.",
    fused=(),
    shared=("block_sparse_moe.shared_experts.",),
    gate="w1",
    up="w3",
    down="w2",
)
# transformers' own spelling of the same
SAVED = Layout(rows=("mlp.gate.e_score_correction_bias", "mlp.e_score_correction_bias"))

FAMILIES = (
    Family(("mixtral", "minimax", "minimax_m2"), layouts=(HUB, SAVED)),
    Family(("phimoe",), layouts=(HUB, Layout(router="mlp.router.weight"))),
    # Residual dense MLP beside the experts; every second layer may be dense. Remote code only.
    Family(("arctic",), layouts=(HUB,), stock=False),
)
