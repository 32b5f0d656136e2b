"""What computes a folded network's products: torch, ONNX Runtime, a GPU; and which of them may."""
