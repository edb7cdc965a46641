"""What a fused Pareto set is compared with; each module here registers some."""
