"""One file per model family, or per group of families that agree; each defines `FAMILIES`.

`UNABLE` has the model types whose layers, as transformers builds them, defeat a way of working. Whoever works that way
finds out by itself, from what is computed; this says so before anything is.
"""

UNABLE = {
    # Their layers pass each other what attention chose: no layer runs alone.
    "stream": ("glm_moe_dsa", "hy_v4"),
    # Their blocks do more than add a shared expert to the weighted sum: no dense MLP stands for them.
    "fold": ("axk1", "beam"),
    # A layer norms or scales what its block gives, or mixes several streams: its output is not what goes with it.
    "add": (
        "afmoe", "beam", "cohere2_moe", "dbrx", "deepseek_v4", "flex_olmo", "granitemoe_swa", "granitemoehybrid",
        "granitemoeshared", "kolibri1", "minimax",
    ),
    # The router's weights scale what experts see: single outputs say nothing of a sum.
    "single": ("llama4", "llama4_text"),
}  # fmt: skip
