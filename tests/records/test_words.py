"""Words for corruptions are read back as these corruptions."""

from __future__ import annotations

import json

from hf_parcor.corruptions import CORRUPTIONS
from hf_parcor.corruptions.catalogue import catalogue_name, corruptions_of_table_1, read_corruptions
from hf_parcor.records.evaluation import corruption_words
from hf_parcor.strict_json import to_plain

WORDS = [
    *("random=0.1,0.2:norm=inf,top-n=9", "gradient=0.0002:norm=1.5", "multi-step=1:steps=3,step-size=0.5"),
    *("multi-step=1:norm=inf", "gaussian=0.1,0.3:relative-to=channel", "uniform=1e-06", "drift=3600:nu-mean=0.06"),
    *("quantization=4,3:per=32,symmetric=false,zero-point=float", "quantization=4:code-range=full", "quantization=8"),
    *("float-quantization=mxfp4,nf4", "float-quantization=fp8_e4m3:per=channel", "bit-flips=1e-07,0.5:bits=sign"),
    *("pruning=0.5,0.7", "pruning=0.9:per=all", "pruning=0.5:per=4"),
    *("bit-flips=0.1:of=int8", "worst-bit-flips=3,5:of=int8,candidates=2", "worst-bit-flips=3:search=data-free"),
]


def test_every_corruption_of_the_catalogue():
    asked_for = read_corruptions(WORDS)
    assert {catalogue_name(one) for one in asked_for} == set(CORRUPTIONS)
    for some in (asked_for, corruptions_of_table_1(), *([one] for one in asked_for)):
        kept = json.loads(json.dumps(to_plain([[catalogue_name(one), one.settings()] for one in some])))
        words = corruption_words(kept)
        assert set(read_corruptions(words)) == set(some), words
        assert len(words) <= len(some)
