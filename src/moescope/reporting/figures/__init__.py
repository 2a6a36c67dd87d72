"""The figures of section 5, drawn by matplotlib: results in, a `Figure` out.

Rule of the folder: a module a figure; nothing is computed that its CSV twin does not hold. No pyplot, so no global
state and no window; `style` holds the one look and writes the files. Figures are sized for paper: 6.75 inches is the
width of a page.
"""

from moescope.reporting.figures.agreement import draw_agreement
from moescope.reporting.figures.balance import draw_balance
from moescope.reporting.figures.cache import draw_cache
from moescope.reporting.figures.consistency import draw_consistency
from moescope.reporting.figures.divergence import draw_divergence, draw_domain_pairs
from moescope.reporting.figures.explain import draw_explained, draw_explained_by_layer
from moescope.reporting.figures.joint import draw_coactivation, draw_transitions
from moescope.reporting.figures.locality import draw_excess, draw_lags
from moescope.reporting.figures.parallel import draw_parallel
from moescope.reporting.figures.prefetch import draw_prefetch
from moescope.reporting.figures.repeats import draw_repeats
from moescope.reporting.figures.saturation import draw_saturation
from moescope.reporting.figures.shares import as_bars, draw_choices, draw_shares
from moescope.reporting.figures.style import save
from moescope.reporting.figures.tokens import draw_tokens
from moescope.reporting.figures.vocabulary import draw_vocabulary
from moescope.reporting.figures.word_classes import draw_word_classes

__all__ = [
    "as_bars",
    "draw_agreement",
    "draw_balance",
    "draw_cache",
    "draw_choices",
    "draw_coactivation",
    "draw_consistency",
    "draw_divergence",
    "draw_domain_pairs",
    "draw_excess",
    "draw_explained",
    "draw_explained_by_layer",
    "draw_lags",
    "draw_parallel",
    "draw_prefetch",
    "draw_repeats",
    "draw_saturation",
    "draw_shares",
    "draw_tokens",
    "draw_transitions",
    "draw_vocabulary",
    "draw_word_classes",
    "save",
]
