"""The network: radial and angular functions, equivariant backbone, heads."""
