"""MaskNet for click-through rates (Wang, She and Zhang, arXiv 2102.07619): blocks, networks and embedding tables."""
