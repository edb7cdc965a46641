"""The comparators of a fused Pareto set; each module here registers some."""
