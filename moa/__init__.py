"""MoA: Mixture-of-Attention for personalised image generation."""
