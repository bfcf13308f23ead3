"""All evaluations as one page: pooled over seeds, plotted, set against targets."""
