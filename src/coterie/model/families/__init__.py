"""One file per model family, or per group of families that agree; each defines `FAMILIES`.

`UNABLE` has the model types whose layers, as transformers builds them, defeat a way of working. Whoever works that way
finds out by itself, from what is computed; this says so before anything is.

`NO_FAMILY` names the model types of transformers that have experts and are deliberately none of ours, with the reason.
"""

UNABLE = {
    # Their layers pass each other what attention chose: no layer runs alone.
    "stream": ("glm5_next", "glm_moe_dsa", "hy_v4", "inkling2", "inkling2_text", "mistral_large4"),
    # Their blocks do more than add a shared expert to one weighted sum: no dense MLP stands for them.
    "fold": ("axk1", "beam", "ernie4_5_moe_vl", "ernie4_5_vl_moe", "longcat_flash"),
    # A layer norms or scales what its block gives, or mixes several streams: its output is not what goes with it.
    "add": (
        "afmoe", "beam", "cohere2_moe", "dbrx", "deepseek_v4", "flex_olmo", "granitemoe_swa", "granitemoehybrid",
        "granitemoeshared", "kolibri1", "longcat_flash", "minimax", "qwen4_exp", "qwen4_exp_text",
    ),
    # The router's weights scale what experts see: single outputs say nothing of a sum.
    "single": ("llama4", "llama4_text"),
}  # fmt: skip

NO_FAMILY = {
    "diffusion_gemma": "writes by denoising blocks of tokens with an encoder and a decoder; nothing here runs that",
    "doge": "its experts are rows of two tables on a grid of product keys, from which no single one can go",
    "dots3_note": "its vision tower has experts of its own; the text model alone is `dots3_note_text`",
    "inkling_mm_model": "its router weighs the shared experts in one softmax with the routed ones, by rows of its own",
    "inkling_text": "its router weighs the shared experts in one softmax with the routed ones, by rows of its own",
    "nllb-moe": "translates; its encoder and its decoder have experts, and one count rules both",
    "openai_privacy_filter": "labels tokens; it is no language model",
    "switch_transformers": "an encoder and a decoder that have experts, and one count rules both",
    "vitpose_backbone": "a vision model whose experts are chosen by the name of a data set, not by a router",
    "zaya": "its router is an MLP that passes states from layer to layer, with a row for skipping the experts",
}
