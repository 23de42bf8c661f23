"""Mixtral's names: experts w1 (gate), w3 (up), w2 (down) under `block_sparse_moe`; also Snowflake Arctic."""

from coterie.model.family import Family, Layout

HUB = Layout.under("block_sparse_moe.", rows=("e_score_correction_bias",), fused=(), gate="w1", up="w3", down="w2")
# transformers' own spelling of the same
SAVED = Layout.under("mlp.", rows=("gate.e_score_correction_bias", "e_score_correction_bias"))

FAMILIES = (
    Family(("mixtral", "minimax", "minimax_m2"), layouts=(HUB, SAVED)),
    *(Family((model_type,), layouts=(HUB,), stock=False) for model_type in ("minimax_text_01", "minimax_m1")),
    Family(("phimoe",), layouts=(HUB, Layout.under("mlp.", router="router.weight"))),
    # Residual dense MLP beside the experts; every second layer may be dense. Remote code only.
    Family(("arctic",), layouts=(HUB,), stock=False),
)
