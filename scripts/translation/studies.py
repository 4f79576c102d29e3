"""What paper 2 did with translation, De-En and En-Vi, and two small studies of our own."""

from __future__ import annotations

from dataclasses import replace

from translation.study import Strengths, Study, gradient_l2, worst_hundred

_PAPERS = {
    "max_tokens": 4096,
    "lr_scheduler_type": "inverse_sqrt",
    "warmup_steps": 8000,
    "adam_beta2": 0.98,
    "label_smoothing_factor": 0.1,
}
STUDIES = {
    "de-en": Study(
        title="IWSLT'14 De-En",
        languages=("de", "en"),
        files=("train", "valid", "test"),
        training={
            **_PAPERS,
            "vocabulary_size": 10_149,
            "learning_rate": 0.0015,
            "gradient_accumulation_steps": 2,
        },
        epochs=70,
        start_epoch=30,
        average=10,
        max_norm=(0.0006, 2),
        l2=(0.4, 2),
        last_layer=(0.002, 1),
        variants=(0.0004, 0.0004),
        awp_start=10,
        strengths=Strengths(
            multi_l2=(0.2, 0.3, 0.35),
            multi_max=(2e-4, 4e-4, 5e-4),
            multi_top=(2e-3, 5e-3, 1e-2),
            gradient_l2=(0.2, 0.5, 1.0),
            gradient_max=(1e-3, 2e-3, 5e-3),
            gaussian=(1e-2, 2e-2, 3e-2),
            uniform=(2e-2, 5e-2, 8e-2),
            bits=(7, 6),
        ),
        multi_step_of_table_3=(4e-4, 5e-4),
        whole=[worst_hundred(0.005)],
        last=[worst_hundred(0.02)],
        layers=worst_hundred(0.02),
        lowercase=True,
    ),
    "en-vi": Study(
        title="IWSLT'15 En-Vi",
        languages=("en", "vi"),
        files=("train", "tst2012", "tst2013"),
        training={
            **_PAPERS,
            "vocabulary_size": 7_669,
            "target_vocabulary_size": 6_669,
            "learning_rate": 0.001,
        },
        epochs=52,
        start_epoch=35,
        average=10,
        max_norm=(0.00045, 2),
        l2=(0.4, 2),
        last_layer=(0.0015, 3),
        variants=(0.0012, 0.0012),
        awp_start=30,
        strengths=Strengths(
            multi_l2=(0.20, 0.22, 0.24),
            multi_max=(2e-4, 4e-4, 5e-4),
            multi_top=(1e-3, 2e-3, 5e-3),
            gradient_l2=(0.5, 1.0, 2.0),
            gradient_max=(5e-4, 1e-3, 2e-3),
            gaussian=(5e-3, 1e-2, 2e-2),
            uniform=(1e-2, 2e-2, 5e-2),
            bits=(6, 5),
        ),
        multi_step_of_table_3=(4e-4, 5e-4),
        whole=[worst_hundred(0.002)],
        last=[worst_hundred(0.01)],
        layers=worst_hundred(0.01),
    ),
    # Our own, small enough for a processor: 1.2 million weights, 29,000 captions; radii that break it.
    "multi30k": Study(
        title="Multi30k De-En, 2 + 2 layers, 128 wide",
        languages=("de", "en"),
        files=("train", "val", "test_2016_flickr"),
        training={
            **_PAPERS,
            "vocabulary_size": 4_000,
            "config_overrides": "encoder_layers=2,decoder_layers=2,d_model=128,encoder_ffn_dim=256,"
            "decoder_ffn_dim=256,dropout=0.1,attention_dropout=0.0,activation_dropout=0.0,max_position_embeddings=256",
            "learning_rate": 0.003,
            "warmup_steps": 800,
            "max_tokens": 1024,
            "max_length": 128,
        },
        epochs=6,
        start_epoch=4,
        average=2,
        max_norm=(0.001, 1),
        l2=(0.5, 1),
        last_layer=(0.003, 1),
        variants=(0.001, 0.001),
        awp_start=4,
        strengths=Strengths(
            multi_l2=(0.5, 1.0, 2.0),
            multi_max=(1e-3, 2e-3, 5e-3),
            multi_top=(0.05, 0.1, 0.2),
            gradient_l2=(0.5, 1.0, 2.0),
            gradient_max=(1e-3, 2e-3, 5e-3),
            gaussian=(1e-2, 2e-2, 5e-2),
            uniform=(2e-2, 5e-2, 1e-1),
            bits=(6, 5),
        ),
        multi_step_of_table_3=(1e-3, 2e-3),
        whole=[worst_hundred(0.05), worst_hundred(0.1), *gradient_l2(0.5, 1.0, 2.0)],
        last=[worst_hundred(0.2), worst_hundred(0.5), *gradient_l2(1.0, 2.0, 4.0)],
        layers=worst_hundred(0.5),
        max_new_tokens=60,
        tokenized=False,
    ),
}
# The same model on a corpus five times as large, of short sentences.
STUDIES["tatoeba"] = replace(
    STUDIES["multi30k"],
    title="Tatoeba De-En, 2 + 2 layers, 128 wide",
    files=("train.tsv.gz", "dev.tsv.gz", "test.tsv.gz"),
    training={**STUDIES["multi30k"].training, "max_tokens": 2048},
    epochs=4,
    start_epoch=2,
    awp_start=2,
)
