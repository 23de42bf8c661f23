"""Sigmoid or biased routers under names of their own, without expert groups."""

from coterie.family import Family, Layout

FAMILIES = (
    Family(
        ("afmoe",),
        layouts=(Layout(router="mlp.router.gate.weight", rows=("mlp.expert_bias",)),),
    ),
    Family(
        ("hy_v3",),
        layouts=(
            Layout(router="mlp.router.gate.weight", rows=("mlp.expert_bias",), shared=("mlp.shared_mlp.",)),
            Layout(rows=("mlp.gate.e_score_correction_bias", "mlp.e_score_correction_bias")),
        ),
    ),
    Family(
        ("ernie4_5_moe",),
        layouts=(
            Layout(
                rows=(
                    "mlp.moe_statics.e_score_correction_bias",
                    "mlp.gate.moe_statics.e_score_correction_bias",
                ),
            ),
        ),
    ),
    Family(
        ("kolibri1",),
        layouts=(
            Layout(
                blocks=("mlp.", "moe."),
                rows=("moe.router.expert_bias", "mlp.gate.e_score_correction_bias"),
            ),
        ),
    ),
    Family(
        ("lfm2_moe",),
        layouts=(
            Layout(
                blocks=("feed_forward.",),
                router="feed_forward.gate.weight",
                rows=("feed_forward.expert_bias",),
                experts="feed_forward.experts.",
                fused=("feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"),
                gate="w1",
                up="w3",
                down="w2",
            ),
        ),
    ),
    Family(
        ("nemotron_h",),
        layouts=(
            Layout(
                blocks=("mixer.",),
                router="mixer.gate.weight",
                rows=("mixer.gate.e_score_correction_bias",),
                experts="mixer.experts.",
                fused=("mixer.experts.up_proj", "mixer.experts.down_proj"),
                shared=("mixer.shared_experts.",),
                whole=("mixer.fc1_latent_proj.", "mixer.fc2_latent_proj."),
                gate=None,
            ),
        ),
    ),
)
